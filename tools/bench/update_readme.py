"""Writes the documents' numbers from the results: a table between `<!-- bench:NAME -->` and `<!-- /bench -->`.

    python -m tools.bench.update_readme [--check]

Each row is the newest measurement of one contender and configuration in tools/bench/results/NAME.csv.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(REPOSITORY / name for name in (
    "README.md", "docs/results.md", "docs/schedules/README.md", "docs/planning/README.md",
    "docs/planning/memory.md"))
RESULTS = REPOSITORY / "tools" / "bench" / "results"
OURS = "dsv3_megatron"


def newest(name: str) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """Rows of a results file by (configuration, contender), then by metric; later rows replace earlier ones."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["config"], row["name"]), {})[row["metric"]] = row
    return found


def newest_by_cpu(name: str) -> dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]]:
    """Rows by (CPU, configuration), then by contender and metric; later rows replace earlier ones of the same CPU."""
    found: dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]] = {}
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cpu = re.sub(r", \d+ threads.*", "", row["device"])
            found.setdefault((cpu, row["config"]), {}).setdefault(row["name"], {})[row["metric"]] = row
    return found


def _in_turn_with_ours(contenders: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, dict[str, str]]]:
    """Contenders whose steps took turns with ours, and only what was measured then."""
    date = contenders[OURS]["throughput"]["date"]
    kept = {contender: {metric: row for metric, row in metrics.items() if row["date"] == date}
            for contender, metrics in contenders.items()}
    return {contender: metrics for contender, metrics in kept.items() if metrics}


def throughput_table(name: str) -> str:
    """Tokens per second of every contender on every CPU, how many times slower than ours, and the products' share."""
    lines = ["| Configuration | Contender | tokens/s | ours is | of the products' rate | steps | device |",
             "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for (_, config), contenders in newest_by_cpu(name).items():
        measured = _in_turn_with_ours(contenders)
        for contender, metrics in measured.items():
            steps = int(float(metrics["num_steps"]["value"]))
            if "rate" in metrics:
                rate = metrics["rate"]
                lines.append(f"| {config} | products alone | {float(rate['value']):,.0f} GFLOP/s |  |  | {steps} | "
                             f"{rate['device']} |")
                continue
            speed, where = float(metrics["throughput"]["value"]), metrics["throughput"]["device"]
            ratio = f"{float(measured[OURS]['throughput']['value']) / speed:.1f}x" if contender != OURS else ""
            lines.append(f"| {config} | {contender} | {speed:,.1f} | {ratio} | {_share(metrics)} | {steps} | {where} |")
    return "\n".join(lines)


def _share(metrics: dict[str, dict[str, str]]) -> str:
    return f"{float(metrics['share_of_products']['value']):.0%}" if "share_of_products" in metrics else ""


def cpus_table(_: str) -> str:
    """Training of `laptop` on every kind of CPU that was measured, beside Transformers and the products alone."""
    lines = ["| CPU | precision | processes | dsv3_megatron | Transformers | ours is | products alone | ours, of their "
             "rate |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for (cpu, config), contenders in newest_by_cpu("training_throughput").items():
        processes = _PROCESSES.get(config.partition("seq=512 batch=4 ")[2])
        if processes is None:
            continue
        measured = _in_turn_with_ours(contenders)
        ours, theirs = (float(measured[who]["throughput"]["value"]) for who in (OURS, "transformers"))
        rate = f"{float(measured['products']['rate']['value']):,.0f} GFLOP/s" if "products" in measured else ""
        load = re.search(r"load [\d.]+", measured[OURS]["throughput"]["device"])
        lines.append(f"| {cpu}{f', {load[0]}' if load else ''} | {config.split()[1]} | {processes} | "
                     f"{ours:,.0f} tokens/s | {theirs:,.0f} tokens/s | {ours / theirs:.1f}x as fast | {rate} | "
                     f"{_share(measured[OURS])} |")
    return "\n".join(lines)


# How a configuration's end is told in the table of CPUs; configurations that end otherwise are left out.
_PROCESSES = {"threads=2": "1 of 2 threads", "threads=1 processes=4": "4 of 1 thread"}


def generate_table(name: str) -> str:
    """Tokens per second and CPU time of every contender, and how many times slower than ours by either.

    Only contenders that took turns with ours are beside it; results from before the CPU time was measured are of an
    older way of decoding and are left out.
    """
    found = newest(name)
    measured = {(config, contender): metrics for (config, contender), metrics in found.items()
                if "cpu_time_per_position" in metrics
                and metrics["throughput"]["date"] == found[config, OURS]["throughput"]["date"]}
    lines = ["| Configuration | Contender | tokens/s | ours is | CPU time of a position | ours is | steps | device |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for (config, contender), metrics in measured.items():
        speed, cpu_ms = (float(metrics[metric]["value"]) for metric in ("throughput", "cpu_time_per_position"))
        ratios = ["", ""]
        if (ours := measured.get((config, OURS))) and contender != OURS:
            ratios = [f"{ratio:.1f}x" for ratio in (
                float(ours["throughput"]["value"]) / speed, cpu_ms / float(ours["cpu_time_per_position"]["value"]))]
        lines.append(f"| {config} | {contender} | {speed:,.1f} | {ratios[0]} | {cpu_ms:.1f} ms | {ratios[1]} | "
                     f"{float(metrics['num_steps']['value']):.0f} | {metrics['throughput']['device']} |")
    return "\n".join(lines)


def whole_process_table(name: str) -> str:
    """Seconds and peak memory of whole commands, and how many times slower than ours."""
    measured = newest(name)
    lines = ["| Input | Command | time | MB/s | ours is | peak memory | runs | device |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for (config, contender), metrics in measured.items():
        seconds = float(metrics["time_median"]["value"])
        ours = measured.get((config, OURS), {}).get("time_median")
        ratio = f"{seconds / float(ours['value']):.1f}x" if ours and contender != OURS else ""
        rate, memory, runs = (
            f"{float(metrics[metric]['value']):,.0f}{unit}" if metric in metrics else ""
            for metric, unit in (("throughput", ""), ("peak_memory", " MB"), ("num_runs", ""))
        )
        device = metrics["time_median"]["device"]
        lines.append(f"| {config} | {contender} | {seconds:.2f} s | {rate} | {ratio} | {memory} | {runs} | {device} |")
    return "\n".join(lines)


def conversion_table(name: str) -> str:
    """Conversions against a plain copy of the same files."""
    lines = ["| Checkpoint | Step | time | against a plain copy | peak memory | rounds | device |",
             "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for (config, step), metrics in newest(name).items():
        if "relative_to_copy" not in metrics:
            continue
        values = {metric: float(row["value"]) for metric, row in metrics.items()}
        lines.append(
            f"| {config} | {step} | {values['seconds']:.1f} s | {values['relative_to_copy']:.2f}x its speed | "
            f"{values['process_peak_memory']:.1f} GB | {values['repeats']:.0f} | {metrics['seconds']['device']} |")
    return "\n".join(lines)


def schedule_table(name: str) -> str:
    """Steps on stages of known times, with the simulator's."""
    lines = ["| Schedule | Step | simulated | ratio | bubble | setting | device |",
             "| --- | ---: | ---: | ---: | ---: | --- | --- |"]
    for (config, schedule), metrics in newest(name).items():
        step, simulated, bubble = (float(metrics[metric]["value"]) for metric in ("step_time", "simulated", "bubble"))
        lines.append(f"| {schedule} | {step:,.0f} ms | {simulated:,.0f} ms | {step / simulated:.3f} | {bubble:,.0f} ms "
                     f"| {config} | {metrics['step_time']['device']} |")
    return "\n".join(lines)


def overlap_table(name: str) -> str:
    """A forward and a backward, one after the other and in turns."""
    lines = ["| Layers | compute | all-to-alls | one after the other | in turns | in turns / the longer | device |",
             "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for (config, _), metrics in newest(name).items():
        compute, transfers, alone, turns = (float(metrics[f"{metric}_median"]["value"]) for metric in
                                            ("compute", "communication", "one_after_the_other", "in_turns"))
        lines.append(f"| {config} | {compute:.2f} s | {transfers:.2f} s | {alone:.2f} s | {turns:.2f} s | "
                     f"{turns / max(compute, transfers):.2f} | {metrics['in_turns_median']['device']} |")
    return "\n".join(lines)


def published_runs_table(name: str) -> str:
    """Published speeds of training runs, and predicted ones."""
    lines = ["| Run | GPUs | Layout | published | predicted | distance | Not modelled |",
             "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    measured = newest(name)
    for (config, kind), metrics in measured.items():
        if kind != "published":
            continue
        run, machine, layout, other, address = config.split("; ")
        published = float(metrics["tokens_per_second_per_gpu"]["value"])
        predicted = measured.get((config, "predicted"), {}).get("tokens_per_second_per_gpu")
        told = "not predicted | |"
        if predicted:
            told = f"{float(predicted['value']):,.0f} | {float(predicted['value']) / published - 1:+.1%} |"
        lines.append(f"| [{run}]({address}) | {machine} | {layout} | {published:,.0f} | {told} {other.strip('-')} |")
    return "\n".join(lines)


def goodput_table(name: str) -> str:
    """Published runs with failures beside the planner's share of time that counts, by formula and by drawn events."""
    rows: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for (config, contender), metrics in newest(name).items():
        rows.setdefault(config, {})[contender] = metrics
    lines = ["| Run | GPUs | published | predicted | drawn | save every | restart | published with | taken |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for config, found in rows.items():
        run, gpus, taken, address = config.split("; ")
        share = {who: float(metrics["effective_training_time"]["value"]) for who, metrics in found.items()}
        published = f"over {share['above']:.0%}" if "above" in share else f"{share['published']:.1%}"
        interval, restart, explaining = (float(found["predicted"][metric]["value"]) / 60
                                         for metric in ("interval", "restart", "explaining_restart"))
        lines.append(f"| [{run}]({address}) | {int(gpus):,} | {published} | {share['predicted']:.1%} | "
                     f"{share['drawn']:.1%} | {interval:.3g} min | {restart:.3g} min | {explaining:.3g} min | "
                     f"{taken} |")
    return "\n".join(lines)


def memory_table(name: str) -> str:
    """Estimated against counted memory: of each run and length the rank whose peak is farthest off."""
    lines = ["| Model | Run | ranks | between steps | estimated | peak | estimated | error | device |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for (config, case), metrics in newest(name).items():
        words = config.split()
        settings = dict(word.split("=") for word in words[1:])
        values = {metric: float(row["value"]) for metric, row in metrics.items()}
        error = values["peak_estimated"] / values["peak"] - 1
        line = (f"| {words[0]}, {settings['seq']} tokens x {settings['batch'].split('x')[0]} | {case} | "
                f"{settings['ranks']} | {values['state']:.2f} MB | {values['state_estimated']:.2f} MB | "
                f"{values['peak']:.2f} MB | {values['peak_estimated']:.2f} MB | {error:+.2%} | "
                f"{metrics['peak']['device']} |")
        key = (words[0], settings["seq"], case)
        if key not in worst or abs(error) > abs(worst[key][0]):
            worst[key] = (error, line)
    return "\n".join([*lines, *(line for _, line in worst.values())])


def rehearsal_table(name: str) -> str:
    """Estimated against rehearsed memory of a GPU run: a line a run, a rank of its pipeline in each column."""
    runs: dict[tuple[str, str, str], dict[int, str]] = {}
    stages: dict[str, int] = {}
    for (config, schedule), metrics in newest(name).items():
        preset, *words = config.split()
        settings = dict(word.split("=") for word in words)
        estimated, seen = (float(metrics[metric]["value"]) for metric in ("peak_estimated", "peak"))
        runs.setdefault((preset, settings["precision"], schedule), {})[int(settings["stage"])] = (
            f"{estimated:.2f} GiB, {estimated / seen - 1:+.2%}")
        stages[preset] = int(settings["stages"])
    lines = ["| Model | precision | schedule | first rank | an inner rank | last rank |",
             "| --- | --- | --- | ---: | ---: | ---: |"]
    for (preset, precision, schedule), ranks in sorted(runs.items()):
        last = stages[preset] - 1
        inner = [text for stage, text in sorted(ranks.items()) if 0 < stage < last]
        lines.append(f"| {preset} | {precision} | {schedule} | {ranks.get(0, '')} | {inner[0] if inner else ''} | "
                     f"{ranks.get(last, '')} |")
    return "\n".join(lines)


# Of the README: what was done, the results file, the metric, the configuration, whom ours is beside.
_SUMMARY = (
    ("preprocess 100 MB of JSON lines", "preprocess", "time_median", "100 MB JSON lines", OURS, "Megatron-LM"),
    ("generate with laptop, one text", "generate", "throughput",
     "laptop fp32 decode batch=1 prompt=64 new=33 threads=2", OURS, "transformers"),
    ("a step of DualPipe on stages of known times", "schedules", "step_time",
     "P=4 micro-batches=16 parts=8 unit=20ms", "dualpipe", "megatron-core combined"),
    ("a step of 1F1B on the same stages", "schedules", "step_time", "P=4 micro-batches=16 parts=8 unit=20ms", "1f1b",
     "megatron-core 1f1b"),
    ("convert 6 GB of bf16 from Hugging Face", "convert", "seconds",
     "V3 widths bf16 layers=2 experts=8 6.04GB workers=2", "hf-to-megatron", "copy before hf-to-megatron"),
    ("convert 4.9 GB of FP8 to Hugging Face", "convert", "seconds",
     "V3 widths fp8 layers=2 experts=8 4.87GB workers=2", "megatron-to-hf", "copy before megatron-to-hf"),
)
_PEERS = {"transformers": "Transformers", "megatron-core combined": "Megatron-Core's combined plan",
          "megatron-core 1f1b": "Megatron-Core's 1F1B", "copy before hf-to-megatron": "a plain copy of the files",
          "copy before megatron-to-hf": "a plain copy of the files"}


def summary_table(name: str) -> str:
    """Draw one table of the README: a row of each kind of measurement, ours beside another program."""
    lines = ["| What | dsv3_megatron | beside | its | ours is | device |", "| --- | ---: | --- | ---: | ---: | --- |"]
    for what, file, metric, config, own, peer in _SUMMARY:
        measured = newest(file)
        ours, theirs = (measured[config, contender][metric] for contender in (own, peer))
        values = [float(row["value"]) for row in (ours, theirs)]
        is_rate = ours["unit"] == "token/s"
        ratio = values[0] / values[1] if is_rate else values[1] / values[0]
        unit = "tokens/s" if is_rate else ours["unit"]
        shown = [f"{value:,.0f} ms" if unit == "ms" else f"{value:,.1f} {unit}" for value in values]
        lines.append(f"| {what} | {shown[0]} | {_PEERS.get(peer, peer)} | {shown[1]} | {ratio:.2f}x as fast | "
                     f"{ours['device']} |")
    return "\n".join(lines)


TABLES = {
    "summary": summary_table,
    "training_by_cpu": cpus_table,
    "memory": memory_table,
    "published_runs": published_runs_table,
    "goodput": goodput_table,
    "rehearsal": rehearsal_table,
    "schedules": schedule_table,
    "overlap": overlap_table,
    "training_throughput": throughput_table,
    "generate": generate_table,
    "preprocess": whole_process_table,
    "convert": conversion_table,
}


def updated(text: str) -> str:
    """A document with every table made anew."""
    def table(match: re.Match[str]) -> str:
        return f"<!-- bench:{match[1]} -->\n{TABLES[match[1]](match[1])}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- /bench -->", table, text, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the documents; with --check, only say whether they are up to date (exit code 1 if one is not)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a document is stale")
    options = parser.parse_args(arguments)
    stale = False
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        new = updated(text)
        stale |= new != text
        if not options.check:
            document.write_text(new, encoding="utf-8")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
