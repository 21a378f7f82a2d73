"""A sweep of a real run: killed with it under way, gone on with at once, and nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.indexed_writer import DatasetWriter
from tests.distributed.launch import ROOT

pytestmark = pytest.mark.distributed

STEPS = 60
SETTINGS = """
[settings]
num_layers = 2
num_dense_layers = 1
hidden_size = 32
num_attention_heads = 2
q_lora_rank = 24
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
ffn_hidden_size = 48
num_experts = 4
moe_ffn_hidden_size = 16
moe_router_topk = 2
moe_router_num_groups = 2
moe_router_group_topk = 1
mtp_num_layers = 0
vocab_size = 96
seq_length = 16
micro_batch_size = 4
global_batch_size = 4
lr_warmup_iters = 5
precision = "fp32"
eval_interval = 0
log_interval = 1
save_interval = 20
split = "100,0,0"
"""


def test_a_real_run_goes_on_where_the_killed_sweep_left_it(tmp_path: Path) -> None:
    prefix = tmp_path / "train"
    with DatasetWriter(str(prefix), vocab_size=96) as writer:
        writer.add_documents(np.arange(3000, dtype=np.int64) % 96, np.full(60, 50))
    file = tmp_path / "study.toml"
    file.write_text(f'output = "{tmp_path}/study"\nseeds = [1]\n{SETTINGS}train_iters = {STEPS}\n'
                    f'data_path = "{prefix}"\n')
    command = [sys.executable, "-m", "dsv3_megatron", "sweep", str(file)]
    run = tmp_path / "study" / "base" / "seed-1"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 240
        while not list(run.glob("checkpoints/iter_*")):
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1]
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert second.returncode == 0, second.stderr
    log = (run / "log.txt").read_text()
    assert len(re.findall(r"^== dsv3 train ", log, re.MULTILINE)) == 2
    lines = [json.loads(line) for line in (run / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    begun = re.findall(r"iteration +(\d+)/", log.rpartition("== dsv3 train")[2])
    assert begun and int(begun[0]) > 20, "the second start went on from a checkpoint"
    assert "| base | 1 of 1 |" in second.stdout
