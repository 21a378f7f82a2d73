"""The products of a step are those of the model, and tables keep CPUs apart."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_megatron.metrics.flops import flops_per_token
from tools.bench import bench_training_throughput as bench
from tools.bench import update_readme
from tools.bench.contenders import Contender, measure
from tools.bench.shapes import LAPTOP

HEADER = "name,config,metric,value,unit,device,versions,commit,date\n"


def contender(name: str, seconds: list[float], processes: int = 1) -> Contender[Any]:
    process: Any = SimpleNamespace(spec=subprocess.Popen)
    return Contender(bench.Setting(name, "fp32", 512, 4, 2, processes), [process] * processes, seconds, list(seconds))


def test_products_of_a_step_are_the_models():
    """Counted from shapes here and from parameters there; there the routers' products are in, a fifth of a percent."""
    counted = sum(product.flops for product in bench.step_products(2048)) / 2048
    assert 0.995 < counted / flops_per_token(LAPTOP, 512).main_linear < 1
    assert all(product.rows == 512 for product in bench.step_products(2048) if product.times == 7 * 16)


def test_the_share_of_the_products_rate(capsys):
    rows = bench.report([contender(bench.OURS, [4.0, 2.0, 3.0]), contender("transformers", [6.0]),
                         contender(bench.PRODUCTS, [1.0, 1.5])])
    found = {(row.name, row.metric): row.value for row in rows}
    rate = sum(product.flops for product in bench.step_products(2048)) / 1.25
    assert found["products", "rate"] == pytest.approx(rate / 1e9)
    share = 2048 / 3.0 * flops_per_token(LAPTOP, 512).main / rate
    assert found[bench.OURS, "share_of_products"] == pytest.approx(share)
    assert found["transformers", "share_of_products"] == pytest.approx(share / 2)
    assert "GFLOP/s" in capsys.readouterr().out
    four = bench.report([contender(bench.PRODUCTS, [1.25], 4)])
    assert four[0].value == pytest.approx(rate / 1e9) and four[0].config.endswith("threads=2 processes=4")
    alone = bench.report([contender(bench.OURS, [3.0])])
    assert not any(row.metric == "share_of_products" for row in alone)


def test_a_step_of_several_processes_is_the_slowests(tmp_path):
    """Each is told its rank and takes part in every step; where one fails, all are ended and it is said."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys\n"
        "for count, _ in enumerate(sys.stdin):\n"
        "    rank = int(os.environ['RANK'])\n"
        "    if rank == 1 and count == 2:\n"
        "        sys.exit(3)\n"
        "    print(json.dumps({'seconds': 1 + rank, 'cpu_seconds': 0.5}), flush=True)\n")
    setting = bench.Setting(bench.OURS, "fp32", 512, 4, 1, 2)
    (measured,) = measure(str(script), [setting], steps=1, warm_up=1, budget_s=60, limit_s=60, log=subprocess.DEVNULL)
    assert (measured.seconds, measured.cpu_seconds, measured.error) == ([2], [1.0], "")
    (failed,) = measure(str(script), [setting], steps=3, warm_up=0, budget_s=60, limit_s=60, log=subprocess.DEVNULL)
    assert failed.seconds == [2, 2] and failed.error == "process ended with code 3"
    assert all(process.poll() is not None for process in failed.processes)


def test_processes_share_the_sequences(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--processes", "3"])
    assert "--processes 3 must divide --batch-size 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--processes", "2", "--contenders", bench.PIPED])
    assert f"{bench.PIPED} takes --processes 4, not 2" in capsys.readouterr().err


def test_every_cpu_has_its_rows(tmp_path, monkeypatch):
    def row(name: str, metric: str, value: float, device: str, date: str) -> str:
        config = "laptop bf16 seq=512 batch=4 threads=2"
        return f'{name},{config},{metric},{value},-,"{device}",v,c,{date}\n'

    amx, old = "Intel(R) Xeon(R) (AVX512, AMX, 2 cores)", "AMD EPYC (AVX2, 2 cores)"
    lines = [row(name, metric, value, f"{device}, 2 threads{load}", date)
             for device, load, date, ours, theirs in ((old, "", "1", 300, 10), (amx, "", "2", 500, 250),
                                                      (amx, ", load 3.5", "3", 900, 300))
             for name, metric, value in ((bench.OURS, "throughput", ours), (bench.OURS, "num_steps", 5),
                                         ("transformers", "throughput", theirs), ("transformers", "num_steps", 5))]
    lines += [row("products", "rate", 1500, f"{amx}, 2 threads, load 3.5", "3"),
              row("products", "num_steps", 5, f"{amx}, 2 threads, load 3.5", "3"),
              row(bench.OURS, "share_of_products", 0.15, f"{amx}, 2 threads, load 3.5", "3"),
              row("transformers-experts-eager", "throughput", 1, f"{amx}, 2 threads", "2")]
    (tmp_path / "training_throughput.csv").write_text(HEADER + "".join(lines))
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path)
    assert update_readme.cpus_table("").splitlines()[2:] == [
        f"| {old} | bf16 | 1 of 2 threads | 300 tokens/s | 10 tokens/s | 30.0x as fast |  |  |",
        f"| {amx}, load 3.5 | bf16 | 1 of 2 threads | 900 tokens/s | 300 tokens/s | 3.0x as fast | 1,500 GFLOP/s "
        "| 15% |"]
    table = update_readme.throughput_table("training_throughput")
    assert "| 900.0 |  | 15% | 5 |" in table and "500.0" not in table and "| products alone | 1,500 GFLOP/s |" in table
    assert "eager" not in table, "it did not take turns with the newest of ours"
