"""Put the kept figures of bench/results into the documents: short tables in the README, all in docs/benchmarks.md.

python -m bench.readme
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.common import RESULTS, shown

ROOT = RESULTS.parents[1]
README, ALL = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
HEAD = """# Every kept figure

Written by `python -m bench.readme` from `bench/results`; each section names the command that made it. Training lies on
the virtual clock, except of testbed and soak, which are real processes. CPU times are compared only within one run.
"""
BESIDE = "of its own beside it"
TESTBED_RUNS = {
    "adaptcl": "AdaptCL",
    "adaptcl-regrows": "AdaptCL that gives widths back",
    "adaptcl-plain": "AdaptCL that gives widths back, plain objective",
    "adaptcl-works": "AdaptCL whose spare time works",
}
"""How sentences call the testbed's AdaptCLs."""

ADAPTCL_COLUMNS = (
    "method",
    "seeds",
    "rounds",
    "total time",
    "time to target",
    "base",
    "best of family",
    "best at AdaptCL's time",
    "over smallest-everywhere",
    "upload",
    "MACs",
)
ADAPTCL_RECORDS = (
    "adaptcl",
    "adaptcl_ablations",
    "adaptcl_small",
    "adaptcl_cifar10",
    "adaptcl_vgg11",
    "adaptcl_async",
    "adaptcl_vit",
)
ADP_RECORDS = ("adp", "adp_uploads", "adp_controls")
ADP_COLUMNS = ("variant", "seeds", "accuracy", "lost points", "train - test", "upload", "last upload", "wire", "MACs")
COS2P_RECORDS = ("cos2p", "cos2p_ablations", "cos2p_cifar10", "cos2p_cifar100", "cos2p_resnet20")
COS2P_COLUMNS = (
    "method",
    "seeds",
    "rounds",
    "base",
    "best of family",
    "in half the time",
    "clients' own",
    "slow clients' own",
    "utilisation",
    "upload MB",
)
ADASPLIT_COLUMNS = (
    "method",
    "seeds",
    "accuracy",
    "spread",
    "GB",
    "client TMAC",
    "C3 (T 8)",
    "learning rate",
    "published accuracy, GB, TMAC, C3",
)
BASELINES_COLUMNS = (
    "method",
    "seeds",
    "= rounds",
    "= time",
    "over smallest-everywhere",
    "over only-capable",
    "= bytes",
    "time to 100% of FedAvg",
    "utilisation",
    "straggler wait",
    "N*",
)


def main() -> None:
    """Rewrite every marked part of the README for which there are results, and docs/benchmarks.md."""
    text = README.read_text(encoding="utf-8")
    parts = {
        "adaptcl": columns_part(ADAPTCL_RECORDS, ADAPTCL_COLUMNS),
        "cos2p": columns_part(COS2P_RECORDS, COS2P_COLUMNS),
        "cos2p_memory": memory_part(),
        "adasplit": columns_part(("adasplit", "adasplit_noniid", "adasplit_iid"), ADASPLIT_COLUMNS),
        "adp": columns_part(ADP_RECORDS, ADP_COLUMNS),
        "baselines": columns_part(("baselines",), BASELINES_COLUMNS),
        "bounds": markdown(bounds()),
        "codesize": codesize_part(),
    }
    for name, content in parts.items():
        text = replace_part(text, name, content)
    README.write_text(text, encoding="utf-8")
    sections = [section(path.stem) for path in sorted(RESULTS.glob("*.json"))]
    ALL.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def replace_part(text: str, name: str, content: str) -> str:
    """The text with what lies between the markers of ``name`` replaced; as it was where there is nothing to say."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if not content or begin not in text:
        return text
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def memory_part() -> str:
    """What client processes of each class of devices measured at their peak, MiB."""
    record = load("cos2p")
    end = " measured"
    rows = [
        {"method": row["method"], "phase": row["phase"]}
        | {name.removesuffix(end): f"{value:.0f}" for name, value in row.items() if name.endswith(end)}
        for row in (record["results"]["memory"] if record else ())
        if "method" in row
    ]
    return markdown(rows) if rows else ""


def columns_part(names: Sequence[str], columns: Sequence[str]) -> str:
    """The main columns of all tables that these benchmarks kept."""
    parts = []
    for record in filter(None, map(load, names)):
        parts.append(source(record))
        for table in record["results"]["tables"]:
            rows = [{name: row[name] for name in columns if name in row} for row in table["rows"]]
            parts.append(f"**{title_of(table)}**\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def codesize_part() -> str:
    """Lines per method: its file, and what only it uses."""
    record = load("codesize")
    rows = record["results"]["rows"] if record else []
    cells = [f"`{row['method']}` {row['file']}" + (f" + {extra}" if (extra := row[BESIDE]) else "") for row in rows]
    return " · ".join(cells)


def bounds() -> list[dict[str, Any]]:
    """What the micro-benchmarks found, beside the bounds that they were given."""
    rows: list[dict[str, Any]] = []
    if merge := load("merge"):
        for row in merge["results"]["rows"]:
            if row["way"] == "ours":
                what = f"extract, validate and merge ResNet-18 for {row['clients']:,} clients, {row['units']} units"
                rows.append({"what": what, "found": f"{row['cpu_s']:.2f} CPU-s, {row['peak_mib']:.0f} MiB"})
        ratios = merge["results"]["ratios"]
        what = "the same for 100 clients / plain contiguous slicing, without any check"
        found = (
            f"{ratios['prefix_over_slicing']:.2f} of its CPU, scattered units {ratios['scattered_over_slicing']:.2f}"
        )
        rows.append({"what": what, "found": found})
    if step := load("step"):
        steps = step["results"]["rows"]
        worst, num_models = max(row["ratio"] for row in steps), len({row["model"] for row in steps})
        what = f"a training step of a resized model / of one built with those widths ({num_models} models, .75 to .25)"
        rows.append({"what": what, "found": f"at most {worst:.3f}"})
        for model in ("resnet18", "vgg16"):
            faster = ", ".join(f"{row['speed_up']:.1f}x" for row in steps if row["model"] == model)
            what = f"a training step of {model} at three quarters, half and a quarter of its width"
            rows.append({"what": what, "found": f"{faster} faster"})
    if engine := load("engine"):
        for row in engine["results"]["rows"]:
            if row["clients"] == 100 and not row["checkpoints"]:
                what = f"{row['transport']}: the server process's overhead for each client and round"
                rows.append({"what": what, "found": f"{row['cpu_ms']:.2f} ms of CPU"})
            elif row["clients"] == 1000:
                what = "LocalTransport: 1,000 clients in a round"
                rows.append({"what": what, "found": f"memory grows by {row['growth_mib']:.1f} MiB"})
    if decide := load("decide"):
        first, later = decide["results"]["worst_ms"], decide["results"]["median_later_ms"]
        what = "AdaptCL's decision for 1,000 clients of ResNet-50"
        rows.append({"what": what, "found": f"first {first:.0f} ms, later {later:.0f} ms"})
    return rows + of_methods() + of_devices()


def of_methods() -> list[dict[str, Any]]:
    """The same of benchmarks that measure one method."""
    rows: list[dict[str, Any]] = []
    for gates in filter(None, (load("gates"), load("gates_avx2"))):
        with_vectors = f", {gates['results']['vectors']} vectors"
        for row in gates["results"]["targets"]:
            where, _, bound = row["target"].partition(": ")
            what = f"ADP's gates against the dense net, density .5{with_vectors}: {where}"
            rows.append({"what": what, "found": f"{row['found']:.2f}x" + (f" (aim: {bound})" if bound else "")})
    if split := load("split_server"):
        for row in split["results"]["rows"][1:]:
            what = f"AdaSplit's server step, masks {row['mask']} / without"
            rows.append({"what": what, "found": f"{row['ratio_to_unmasked']:.2f} of the samples a second (aim: .70)"})
        rows += of_server(split["results"])
    if speed := load("cos2p_speed"):
        for phase in ("weights", "masks"):
            found = ranges((row["model"], row["ratio"]) for row in speed["results"]["rows"] if row["phase"] == phase)
            what = f"Co-S2P's {phase} phase / a plain ViT's step of the same MACs, per sample"
            rows.append({"what": what, "found": f"{found} (aim: at most 1.15)"})
        if alone := [(row["model"], ratio) for row in speed["results"]["rows"] if (ratio := row.get("over_frozen"))]:
            what = "Co-S2P's masks phase / the same step of the same ViT with the same weights frozen, no gates"
            rows.append({"what": what, "found": ranges(alone)})
    if scale := load("cos2p_scale"):
        run = scale["results"]["run"]
        what = f"Co-S2P, {run['num_parameters'] / 1e6:.0f} M parameters, 16 clients, {run['merges']} merges"
        memory = f"server {run['server_gib']:.1f} GiB, client {run['client_gib']:.1f} GiB"
        merging = f"merging 16 {run['merge_cpu_s_16']:.1f} CPU-s"
        rows.append({"what": what, "found": f"{run['wall_s'] / 60:.1f} minutes, {memory}, {merging}"})
    return rows


def ranges(figures: Iterable[tuple[str, float]]) -> str:
    """From where to where the figures of each model go."""
    by_model: dict[str, list[float]] = {}
    for model, figure in figures:
        by_model.setdefault(model, []).append(figure)
    return ", ".join(f"{model} {min(found):.2f} to {max(found):.2f}" for model, found in by_model.items())


def of_server(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a server of split learning keeps up with and holds; records from before this was measured say nothing."""
    rows, crowd = [], results["crowd"]
    if (slowness := crowd.get("device_slowness_kept_up_with")) is not None:
        uploaders = f"{crowd['clients']} clients that all upload every batch"
        what = f"AdaSplit's server keeps up with {uploaders} if a device's step takes"
        rows.append({"what": what, "found": f"{slowness:.0f} times its core's: not with devices as fast as itself"})
    for row in results["memory"]:
        if "verdict" in row:
            share = row["peak_above_server"] / row["bound_on_two_stretches"]
            what = f"memory for uploads of {row['max_upload_bytes'] / 2**20:g} MiB from {row['clients']} clients"
            rows.append({"what": f"{what} / two of each", "found": f"{share:.2f} (aim: at most 1)"})
    return rows


def of_devices() -> list[dict[str, Any]]:
    """The same of benchmarks with real processes."""
    rows: list[dict[str, Any]] = []
    if message := load("message"):
        no, yes = message["results"]["rows"]
        what = "a message's CPU on a device besides training, torch kept in memory / imported for each"
        found = f"{message['results']['cpu_ratio']:.2f} ({yes['cpu_s']:.1f} of {no['cpu_s']:.1f} s)"
        rows.append({"what": what, "found": found})
        what = "nodes that ask for work every half second and keep one core of a SuperLink (with database) busy"
        rows.append({"what": what, "found": f"{1 / message['results']['idle_node_cpu_ratio']:.0f}"})
    if (testbed := load("testbed")) and (variants := testbed["results"].get("variants")):
        where = "four unequal hosts, real quotas and links: "
        for row in variants:
            rows += [{"what": where + what, "found": found} for what, found in of_variant(row).items()]
        if cos2p := testbed["results"].get("cos2p"):
            what = f"{where}Co-S2P's utilisation / its synchronous self's"
            rows.append({"what": what, "found": f"{cos2p['utilisation_ratio']:.2f}"})
    if soak := load("soak"):
        found = soak["results"]
        hurt = ", ".join(f"{count} x {kind}" for kind, count in found["injected"].items())
        what = f"{found['nodes']} SuperNodes for {found['seconds'] / 60:.0f} minutes: {hurt}"
        grown = f"{found['late_mib'] / found['early_mib']:.2f}"
        rows.append({"what": what, "found": f"{found['rounds_merged']} rounds merged, memory late/early {grown}"})
    return rows


def section(name: str) -> str:
    """All tables of one benchmark."""
    record = load(name)
    assert record is not None
    parts = [f"## {name}", source(record)]
    if (picture := RESULTS / f"{name}.svg").exists():
        parts.append(f"![{name}](../{picture.relative_to(ROOT).as_posix()})")
    for what, value in record["results"].items():
        if what == "tables":
            for table in value:
                own = [markdown(rows) for rows in table.values() if is_table(rows)]
                parts.append("\n\n".join([f"**{title_of(table)}**", *own]))
        elif is_table(value):
            parts.append(markdown(value))
        elif isinstance(value, dict) and is_table([value]):
            parts.append(markdown([value]))
    return "\n\n".join(parts) + "\n"


def title_of(table: Mapping[str, Any]) -> str:
    """What a table of many is about: its title, or everything beside its rows that is one value."""
    if "title" in table:
        return str(table["title"])
    return " · ".join(f"{key} {shown(value)}" for key, value in table.items() if not isinstance(value, list | dict))


def of_variant(row: dict[str, Any]) -> dict[str, str]:
    """What one of the testbed's AdaptCLs saves, what its model is worth (on unseen images if there were any), and how
    equal it has made the hosts: what was measured -> found."""
    unseen = row["accuracy_gained_unseen"]
    gain = row["accuracy_gained"] if unseen is None else unseen
    name, rounds = TESTBED_RUNS[row["run"]], f"{row['rounds_ratio']:g} x its rounds"
    after_five, at_last = (
        f"{row[f'fastest_{when}']:.2f} to {row[f'slowest_{when}']:.2f}" for when in ("after_five", "at_last")
    )
    return {
        f"{name}: wall and update time, and accuracy, against FedAvg's ({rounds})": (
            f"{-row['wall_time_saved']:.0%}, {-row['update_time_saved']:.0%}, {100 * gain:+.1f} points"
        ),
        f"{name}: hosts' update times / the reference's, after five decisions; at last (aim: .85 to 1.15)": (
            f"{after_five}; {at_last}"
        ),
        f"{name}: retention ratios / the virtual clock's, mean error": f"{row['rate_error']:.3f}",
    }


def load(name: str) -> dict[str, Any] | None:
    """A kept record, None if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def source(record: Mapping[str, Any]) -> str:
    """Where figures come from, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"`{record['command']}` · {record['machine']} · {versions} · {record['date']}"


def is_table(rows: Any) -> bool:
    """Whether a result is a list of rows."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in order of appearance."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([shown(row.get(head)) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
