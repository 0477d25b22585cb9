"""``python -m lamp_fast.serve RUN``: classify pictures over HTTP.

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'localhost:8000/classify?top=3'
    curl -F picture=@cat.jpg -F picture=@dog.png localhost:8000/classify

Answers are JSON with the rows of ``predict --json``. Ctrl-C ends it, once those who wait have
theirs.
"""

import contextlib
import socket
import sys

from lamp_fast import cli
from lamp_fast.data.settings import TTE
from lamp_fast.errors import InputError
from lamp_fast.extras import need
from lamp_fast.fields import validate
from lamp_fast.files import reason_of
from lamp_fast.serve.settings import ServeConfig

_NEEDED = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
# A connection is a file that is open; most systems allow 1,024.
_CONNECTIONS = 512


def main(config: ServeConfig) -> int:
    """Serve until told to end."""
    validate(config)
    for name in _NEEDED:
        need("serve", name, "serve")
    with _bound(config.host, config.port) as place:
        _serve(config, place)
    return 0


def _serve(config: ServeConfig, place: socket.socket) -> None:
    import uvicorn

    from lamp_fast.classifier import Classifier
    from lamp_fast.predict import choose_classes
    from lamp_fast.serve.app import build_app

    classifier = Classifier.load(
        config.run,
        device=config.device,
        pretrained=config.pretrained,
        tte=TTE[config.tte],
        hierarchy=config.hierarchy,
    )
    names = classifier.check_names(choose_classes(classifier, config))
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    cli.say(f"serving {len(names)} classes at http://{shown}:{port}; Ctrl-C ends it")
    if not _is_loopback(host):
        cli.say(
            "warning: anyone who reaches this address can ask; there is no password and no"
            " encryption",
            stream=sys.stderr,
        )
    settings = uvicorn.Config(
        build_app(classifier, names, config),
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(config.timeout)),
    )
    # How a server ends that was started by hand; uvicorn has answered who waited.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[place])
    cli.say("ended")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to before the server listens.

    Raises:
        InputError: no such address here, or a port that is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        place = socket.socket(family, kind, protocol)
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
        except OSError:
            place.close()
            raise
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({reason_of(error)})"
        ) from None
    return place


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


if __name__ == "__main__":
    cli.run(ServeConfig, main, sys.argv[1:], prog="python -m lamp_fast.serve", description=__doc__)
