"""The Transformer Engine spec, on the modules of `torch_transformer_engine.py`, compared with the local modules.

A process of its own, because Megatron-Core looks for Transformer Engine once, when it is imported:

    python -m tests.parity.engine_comparison FILE        what was found, as JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.parity.torch_transformer_engine import install

install()

from tests.gpu import runs  # noqa: E402 - prepares the platform; imports Megatron-Core

# isort: split
import torch  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402

from dsv3_megatron.config.model import ModelConfig  # noqa: E402
from dsv3_megatron.model import build  # noqa: E402
from dsv3_megatron.model.global_names import whole_parameters  # noqa: E402
from dsv3_megatron.model.rotary import change_context  # noqa: E402
from tests.parity.architectures import VARIANTS, run_of, variant  # noqa: E402

IMPLS = ("local", "transformer_engine")


def compare_trees(model: ModelConfig) -> dict[str, Any]:
    """Names, initial weights, marks and checkpoint keys of both trees: what is different, by name."""
    held: dict[str, dict[str, Any]] = {}
    saved: dict[str, dict[str, Any]] = {}
    for impl in IMPLS:
        run = run_of(model, transformer_impl=impl)
        with runs.process_groups(run) as groups:
            stage = build.build_stages(run, groups, precision="fp32")[0][0]
            held[impl] = {whole.name: (whole.shape, whole.local.tolist(), _marks(whole.parameter))
                          for whole in whole_parameters(stage, groups)}
            metadata = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True}
            saved[impl] = {}
            for entry in stage.sharded_state_dict(metadata=metadata).values():
                built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
                saved[impl] |= {shard.key: (shard.global_shape, str(getattr(shard, "dtype", "object")))
                                for shard in nested_values([built])}
    return {what: sorted(name for name in both["local"].keys() | both["transformer_engine"].keys()
                         if both["local"].get(name) != both["transformer_engine"].get(name))
            for what, both in (("parameters", held), ("checkpoint", saved))}


def _marks(parameter: torch.nn.Parameter) -> list[bool]:
    """What Megatron-Core reads off a parameter to reduce its gradient."""
    return [getattr(parameter, "allreduce", True), getattr(parameter, "sequence_parallel", False)]


def compare_steps(model: ModelConfig) -> dict[str, Any]:
    """Losses and gradients of one step from equal weights."""
    local, engine = (runs.model_step(run_of(model, transformer_impl=impl, precision="fp32")) for impl in IMPLS)
    errors = {name: runs.relative_error(engine.gradients[name], expected)
              for name, expected in local.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    return {"same_gradients": engine.gradients.keys() == local.gradients.keys(), "losses": [
        [step.main, step.mtp] for step in (local, engine)], "worst_gradient": worst, "error": errors[worst],
        "equal_choices": runs.share_of_equal_choices(local, engine)}


def extend_context() -> dict[str, dict[str, Any]]:
    """Losses of each tree built for the short context, extended in place, and of one built for the long context."""
    found: dict[str, dict[str, Any]] = {}
    for impl in IMPLS:
        found[impl] = {}
        for name, (first, then) in {"plain": ("plain", None), "extended": ("plain", "yarn"), "long": ("yarn", None),
                                    "back": ("yarn", "plain")}.items():
            run = run_of(variant(first), transformer_impl=impl)
            with runs.process_groups(run) as groups:
                stage = build.build_stages(run, groups, precision="fp32")[0][0]
                runs.set_weights(stage, groups)
                if then is not None:
                    change_context([stage], variant(then))
                tokens_BS = torch.arange(run.training.seq_length + 1).remainder(run.model.vocab_size)[None]
                with torch.no_grad():
                    losses = stage(input_ids=tokens_BS[:, :-1], attention_mask=None, labels=tokens_BS[:, 1:],
                                   position_ids=torch.arange(run.training.seq_length)[None])
                found[impl][name] = losses.main_BS.tolist()
    return found


def move_checkpoints(folder: Path, precision: str) -> dict[str, list[str]]:
    """A run that is saved from one tree and loaded into the other: what is not equal bit for bit."""
    lost = {}
    for source, target in (IMPLS, IMPLS[::-1]):
        directory = folder / f"{precision}-{source}"
        with runs.trainer(runs.run_config(precision=precision, transformer_impl=source)) as writer:
            writer.step()
            writer.write(directory)
            state = writer.state()
        with runs.trainer(runs.run_config(precision=precision, transformer_impl=target, seed=5)) as reader:
            reader.read(directory)
            lost[f"{source} to {target}"] = runs.differences(state, reader.state())
    return lost


def main(file: str) -> None:
    """Compare everything and write what was found."""
    build.resolve_transformer_impl = lambda requested, **_: requested  # type: ignore[assignment] # it wants CUDA
    found: dict[str, Any] = {"trees": {}, "steps": {}, "checkpoints": {}}
    for name in VARIANTS:
        found["trees"][name] = compare_trees(variant(name))
        found["steps"][name] = compare_steps(variant(name))
    found["extension"] = extend_context()
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            found["checkpoints"] |= {f"{precision} {move}": lost
                                     for move, lost in move_checkpoints(Path(folder), precision).items()}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
