"""`python -m benchmarks.scaling`: measure replicas on this machine, draw them in virtual time, fill in the docs' page.

    python -m benchmarks.scaling --output runs/scaling --docs docs/scaling.md --picture docs/img/scaling.svg

The parts that are measured on this machine are the times of the virtual one; see `measured` and `virtual`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import balancer, page
from benchmarks.scaling import measured, virtual
from splitfed.tracking import plots

COUNTS = (1, 2, 4, 8)
BEYOND = (1, 2, 4, 8, 16, 32)


def table(found: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rates = found["replicas"]
    lines = ["| measured on this machine, one thread a process | batches a second | of one |", "|---|--:|--:|"]
    for name, base, label in (
        ("bare 1", "bare 1", "one process that only runs the body (no splitfed)"),
        ("bare 2", "bare 1", "two of them: the limit of these cores"),
        ("direct 1", "direct 1", "one replica"),
        ("direct 2", "direct 1", "two replicas, two clients"),
        *((f"balanced {count}", "balanced 1", f"{count} behind the balancer") for count in found["counts"]),
    ):
        rate = rates[name]["rate"]
        lines.append(f"| {label} | {rate:.2f} | {rate / rates[base]['rate']:.2f} |")
    commits, kills = found["commits"], found["kills"]
    without, under = commits["without"]["rate"], commits["one per 8 batches"]["rate"]
    lines.append(f"| two replicas, one commit per 8 batches on the same cores | {under:.2f} | {under / without:.2f} |")
    calm, killed = kills["rate without kills"], kills["rate with kills"]
    label = f"three replicas, {kills['kills']} killed, one each 10 s, of those without kills"
    lines.append(f"| {label} | {killed:.2f} | {killed / calm:.2f} |")
    lines += ["", "| balancer in front of three replicas | backwards without a recompute |", "|---|--:|"]
    for name, one in found["affinity"].items():
        lines.append(f"| {name} | {100 * one['kept']:.1f} % |")
    lines += ["", "| pending batches | memory of a replica, MiB |", "|--:|--:|"]
    lines += [f"| {int(count):,} | {size:.0f} |" for count, size in found["memory"].items()]
    lines += ["", "| replicas, in virtual time | " + " | ".join(found["virtual"]) + " |"]
    lines.append("|--:|" + "--:|" * len(found["virtual"]))
    base = found["virtual"]["no commits"][0]
    for place, count in enumerate(found["beyond"]):
        cells = (f"{rates[place] / base:.2f}" for rates in found["virtual"].values())
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", behind(found["parts"])])


def behind(parts: dict[str, float]) -> str:
    """The times behind the virtual rows, and how many replicas one accumulator keeps up with."""
    took = {name: 1e3 * seconds for name, seconds in parts.items()}
    keeps = 8 / parts["commit"] * (parts["client"] + parts["forward"] + parts["backward"])
    return (
        f"In milliseconds of a core: a forward {took['forward']:.0f}, "
        f"a backward with its graph {took['backward']:.0f}, "
        f"the client's own work {took['client']:.0f}, the weights of a new version {took['load']:.0f}, "
        f"a commit of eight batches {took['commit']:.0f}, the start of a replica {took['start']:.0f}. "
        f"One accumulator commits eight batches as fast as {keeps:.0f} such replicas answer them; "
        "with more replicas a commit has more batches."
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Throughput against the number of replicas, as multiples of one."""
    figure, (axes,) = plots.figure(8, 4.2)
    counts = found["beyond"]
    axes.plot(counts, counts, color=plots.FAINT, linewidth=1, linestyle=":", label="as many times as replicas")
    base = found["virtual"]["no commits"][0]
    for (way, rates), colour in zip(found["virtual"].items(), plots.PALETTE, strict=False):
        axes.plot(counts, [rate / base for rate in rates], "o-", color=colour, linewidth=2, markersize=4, label=way)
    if found["counts"]:
        one = found["replicas"]["balanced 1"]["rate"]
        real = [found["replicas"][f"balanced {count}"]["rate"] / one for count in found["counts"]]
        label = f"measured on {found['cores']} cores"
        axes.plot(found["counts"], real, "s", color=plots.INK, markersize=6, label=label)
    title = "Batches a second, as multiples of one replica's, with as many clients as replicas"
    plots.style(axes, title=title, x="replicas", y="")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def main() -> None:
    """Measure, simulate, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), help="where scaling.json goes")
    parser.add_argument("--docs", type=Path, help="write the tables into this page, between its markers")
    parser.add_argument("--picture", type=Path, help="draw the throughput here")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each window")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each way, in turns")
    settings = parser.parse_args()
    reason = balancer.missing()
    if reason is not None:
        raise SystemExit(f"replicas are measured behind a balancer, and there is {reason}")
    found = measured.run(settings.seconds, settings.rounds, COUNTS)
    times = measured.Times(**found["parts"])
    found |= {"counts": list(COUNTS), "beyond": list(BEYOND), **page.machine()}
    found["virtual"] = virtual.rates(times, list(BEYOND))
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"{page.described(found)}\n\n{table(found)}"
    print(text)
    if settings.docs:
        page.fill(settings.docs, "scaling", text)
    if settings.picture:
        draw(found, settings.picture)


if __name__ == "__main__":
    main()
