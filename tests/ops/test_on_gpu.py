"""What only a GPU shows: CUDA graphs, other streams and devices, and no wait for the device."""

import calls
import pytest
import torch
import under_test

from lamp_fast.ops import dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CALLS = {
    "retrieve": lambda: calls.retrieve(37, 20, 768, 6),
    "long": lambda: calls.prefix_attention(4, 4, 3, 77, 8, 64),
    "tree": lambda: calls.prefix_attention(4, 4, 3, 77, 8, 64, tree=0.1),
    "short": lambda: calls.prefix_attention(12, 4, 3, 12, 8, 64, causal=True, blind=1),
    "indexed": lambda: calls.prefix_attention(
        5, 3, 2, 12, 8, 64, causal=True, index=[2, 0, 0, 1, 2]
    ),
    "quick_gelu": lambda: calls.gelu("quick_gelu", 33, 512),
    "gelu": lambda: calls.gelu("gelu", 33, 512),
    "add_layer_norm": lambda: calls.add_layer_norm(33, 768),
}


def on_gpu():
    for name, make in CALLS.items():
        op = make().op
        for impl in dispatch.IMPLEMENTATIONS[op]:
            if impl in under_test.ON_GPU:
                marks = under_test.skipped(op, impl)
                yield pytest.param(name, impl, marks=marks, id=f"{name}-{impl}")


every_call = pytest.mark.parametrize(("name", "impl"), [*on_gpu()])


def prepare(name, impl, device="cuda"):
    call = CALLS[name]()
    run = calls.differentiate(call, impl, torch.float32, torch.device(device))
    return call, run


@every_call
def test_a_cuda_graph_replays_forward_and_backward(name, impl):
    _, run = prepare(name, impl)
    wanted = [each.clone() for each in run()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for each in got:
        each.fill_(-1)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@every_call
def test_the_current_stream_is_used(name, impl):
    _, run = prepare(name, impl)
    wanted = [each.clone() for each in run()]
    torch.cuda.synchronize()
    busy, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy / 64
        got = run()
        done = stream.record_event()
    assert not done.query()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@every_call
def test_nothing_waits_for_the_device(name, impl):
    _, run = prepare(name, impl)
    run()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
def test_tensors_on_another_device_than_the_current_one(name, impl):
    wanted = prepare(name, impl)[1]()
    got = prepare(name, impl, "cuda:1")[1]()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))
