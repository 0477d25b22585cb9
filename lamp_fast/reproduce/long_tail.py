"""The long-tail field's table: what is tried on its benchmarks, beside what was published there."""

from lamp_fast.data.protocol import SIZE_GROUP_TITLES
from lamp_fast.reproduce.layout import ADJUSTED, ZEROSHOT, Metric, Panel, PaperTable, Row

METRICS = (
    Metric("acc", "all", sources=("acc_base",)),
    *(Metric(key, title) for key, title in SIZE_GROUP_TITLES.items()),
    Metric("balanced_base", "balanced"),
    Metric("worst_base", "worst class"),
)

LONG_TAIL = PaperTable(
    name="lt",
    caption="Long-tailed recognition over all classes",
    preset="table16-cross",
    panels=(Panel("All classes", {}),),
    rows=(
        Row("CLIP", ZEROSHOT),
        Row("Linear probe", "linear-probe"),
        Row(
            "Linear probe, balanced",
            "linear-probe",
            {"linear-probe.probe_class_weight": "balanced"},
        ),
        Row("SS-Text", "ss-text"),
        Row("SS-Text+", "ss-text+"),
        Row("Tip-Adapter-F+LA", "tip-f", ADJUSTED),
        Row("CoOp+LA", "coop", ADJUSTED),
        Row("MMA+LA", "mma", ADJUSTED),
        Row("LAMP+LA", "lamp", ADJUSTED),
        Row("LIFT", "lift"),
        Row("LIFT, TTE", "lift", paper="LIFT, TTE", tte=True),
        Row("LIFT+", "lift+"),
        Row("LIFT+, TTE", "lift+", tte=True),
    ),
    published=("VL-LTR", "LPT"),
    data=("cifar100_lt", "imagenet_lt", "places_lt", "inaturalist2018"),
    ratios=(100.0, 50.0, 10.0),
    metrics=METRICS,
    split="all",
    every_method=True,
    logit_adjusted=True,
    # Two of the benchmarks have no validation part, so it would be taken from their training
    # pictures, and the field does not look at the others'. The prompts' own numbers of epochs are
    # for a few pictures a class, or LAMP's for a transfer.
    defaults={
        "linear-probe": {"linear-probe.probe_c": 1.0},
        "tip": {"tip.tip_alpha": 1.17, "tip.tip_beta": 1.0},
        "tip-f": {"tip-f.tip_alpha": 1.17, "tip-f.tip_beta": 1.0},
        "coop": {"optim.epochs": 10},
        "cocoop": {"optim.epochs": 10},
        "lamp": {"optim.epochs": 10},
    },
    remark=(
        "Every class is trained and tested, and a run is its last epoch. all: of all test pictures;"
        " many, medium, few: mean accuracy of the classes with so many training pictures, with the"
        " edges of LIFT and LPT (OLTR counts 100 with many and 20 with few); CIFAR-100-LT's classes"
        " are grouped at every ratio by their pictures at imb 100, as LIFT does. The table's own"
        " rows choose nothing on validation pictures: linear probes have scikit-learn's C = 1,"
        " Tip-Adapter-F the alpha and beta that it starts with on ImageNet. Where nothing else is"
        " said, CoOp, CoCoOp and LAMP train for 10 epochs, as LIFT does. TTE: the mean of the"
        " logits of five crops."
    ),
)
