"""nginx in front of replicas, as `examples/deploy/balancer.conf` has it; for benchmarks and tests."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = "nginx"
_MAIN = """\
daemon off;
master_process off;
pid "{folder}/nginx.pid";
error_log "{folder}/error.log" warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path "{folder}/body";
    proxy_temp_path "{folder}/proxy";
    fastcgi_temp_path "{folder}/fastcgi";
    uwsgi_temp_path "{folder}/uwsgi";
    scgi_temp_path "{folder}/scgi";
    include "{folder}/balancer.conf";
}}
"""
_SERVER = """\
server {{
    listen {listen};
    client_max_body_size 256m;         # as --max-body of splitfed serve
    client_body_buffer_size 1m;
    proxy_request_buffering on;        # a slow owner holds a connection here, not a replica
    proxy_max_temp_file_size 0;
    proxy_next_upstream error timeout http_502 http_503 http_504 non_idempotent;
    proxy_read_timeout 300s;

    location / {{
        proxy_pass http://{target};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;{more}
    }}
}}
"""


def named(listen: str, replicas: Sequence[str]) -> str:
    """The configuration that names the replica in each answer, and sends it what carries that name.

    Args:
        listen: Where the balancer listens: a port, or address and port.
        replicas: Address and port of each replica.
    """
    pool = "\n".join(f"    server {place};" for place in replicas)
    groups = [f"upstream replica-{i} {{ server {place}; keepalive 16; }}" for i, place in enumerate(replicas)]
    places = [f"    ~{place.replace('.', '[.]')}$ replica-{i};" for i, place in enumerate(replicas)]
    more = "\n        add_header splitfed-affinity $upstream_addr;"
    return "\n".join(
        [
            "upstream replicas {",
            "    zone replicas 64k;",
            pool,
            "    keepalive 16;",
            "}",
            *groups,
            "",
            "map $http_splitfed_affinity $replica {",
            "    default replicas;                  # a key that names none of these: whose turn it is",
            *places,
            "}",
            "",
            _SERVER.format(listen=listen, target="$replica", more=more),
        ]
    )


def hashed(listen: str, replicas: Sequence[str]) -> str:
    """The configuration that hashes the key to a replica."""
    return "\n".join(
        [
            "map $http_splitfed_affinity $key {",
            "    default $http_splitfed_affinity;",
            '    "" $request_id;                    # no key: any replica',
            "}",
            "",
            "upstream replicas {",
            "    zone replicas 64k;",
            "    hash $key consistent;",
            *[f"    server {place};" for place in replicas],
            "    keepalive 16;",
            "}",
            "",
            _SERVER.format(listen=listen, target="replicas", more=""),
        ]
    )


def in_turn(listen: str, replicas: Sequence[str]) -> str:
    """The configuration of a balancer without affinity: each request goes to the next replica."""
    lines = ["upstream replicas {", *[f"    server {place};" for place in replicas], "    keepalive 16;", "}", ""]
    return "\n".join([*lines, _SERVER.format(listen=listen, target="replicas", more="")])


def missing() -> str | None:
    """Why there can be no balancer here; `None` if there can."""
    if shutil.which(PROGRAM) is None:
        return f"no {PROGRAM} on this machine: Debian's package of that name has it"
    return None


@contextmanager
def balancing(configuration: str, url: str, folder: Path) -> Iterator[str]:
    """Nginx with a configuration while the block runs.

    Args:
        configuration: As the functions above write it.
        url: What it will answer at.
        folder: For its files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "balancer.conf").write_text(configuration)
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder))
    program = shutil.which(PROGRAM)
    if program is None:
        raise RuntimeError(missing())
    command = [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _await_answer(process, url)
            yield url
        finally:
            process.kill()


def _await_answer(process: subprocess.Popen[str], url: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers: that no replica does is another matter
        except OSError:
            time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"{PROGRAM} doesn't answer at {url}: {process.communicate()[1]}")
