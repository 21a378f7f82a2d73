"""Turns Megatron-LM's own flags on a command line into fields of a run, by the table in `megatron_flags.py`.

Usage:
    words, given = take_flags(sys.argv[1:])             # what is left for this library's own parser
    run, notes = apply_flags(given, run, own_fields)
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.megatron_flags import ALWAYS, BY_NAME, FLAGS, NO_EFFECT, REFUSED, TRANSLATED, MegatronFlag
from dsv3_megatron.config.model import MAX_LAYERS
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.values import whole_number


def take_flags(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into the words for other flags, and the values of the table's flags by name.

    Raises:
        ConfigError: a flag is given twice, or has more or fewer words than it takes.
    """
    rest: list[str] = []
    given: dict[str, list[str]] = {}
    index = 0
    while index < len(words):
        name, equals, value = words[index].partition("=")
        flag = BY_NAME.get(name)
        index += 1
        if flag is None:
            rest.append(words[index - 1])
            continue
        values = [value] if equals else []
        while not equals and flag.nargs != "0" and index < len(words) and not words[index].startswith("--"):
            values.append(words[index])
            index += 1
            if flag.nargs == "1":
                break
        if name in given:
            first, second = (" ".join([name, *words]) for words in (given[name], values))
            raise ConfigError(f"{name} is given twice: {first} and {second}; leave one out")
        if (flag.nargs == "0") != (not values):
            raise ConfigError(f"argument {name}: {'takes no value' if values else 'expected one argument'}; see --help")
        given[name] = values
    return rest, given


def apply_flags(given: Mapping[str, list[str]], run: RunConfig, own: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """A run with what Megatron-LM's flags say, and what is to be said about them, a line each.

    Args:
        given: Words of each flag that was given, as `take_flags` returns them.
        run: The run without them.
        own: Fields that this library's own flags gave, which no other flag may contradict.

    Raises:
        ConfigError: a flag is refused, has a value that means something else here, or contradicts another flag.
    """
    fields = dict.fromkeys(own, "its own flag")
    notes: list[str] = []
    by_fate: dict[str, list[str]] = {}
    problems = [problem for name, values in given.items() for problem in _problems(BY_NAME[name], values)]
    if problems:  # all of them: a recipe of a hundred flags is not mended one start at a time
        raise ConfigError("; ".join(problems))
    for flag in FLAGS:  # in the table's order, in which later ones build on earlier ones
        if flag.name not in given:
            continue
        values = given[flag.name]
        if flag.fate != TRANSLATED:
            by_fate.setdefault(flag.fate, []).append(" ".join([flag.name, *values]))
            continue
        changes = _TRANSLATIONS[flag.name](flag.name, values, run, given)
        for field, value in changes.items():
            before = _value_of(run, field)
            if field in fields and before != value:
                raise ConfigError(f"{' '.join([flag.name, *values])} means {field}={_shown(value)}, and "
                                  f"{fields[field]} says {field}={_shown(before)}; leave one out")
            fields[field] = flag.name
        run = run.override(**changes)
        if changes:
            notes.append(f"{' '.join([flag.name, *values])}: "
                         + ", ".join(f"{field}={_shown(value)}" for field, value in changes.items()))
    notes += [f"{words} here: {', '.join(by_fate[fate])}" for fate, words in (
        (ALWAYS, "in every run"), (NO_EFFECT, "without effect")) if fate in by_fate]
    return run, notes


def require_yarn(run: RunConfig, own: Mapping[str, Any]) -> None:
    """Refuse flags of YaRN for a run without it: Megatron-LM's latent attention has it by default.

    Raises:
        ConfigError: one that would change nothing was given.
    """
    if "yarn" in (run.model.rope_type, *(phase.rope_type for phase in run.training.phases)):
        return
    defaults = {"rotary_scaling_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    for name, default in defaults.items():
        if own.get(name, default) != default:
            raise ConfigError(f"{name}={own[name]} is of YaRN, and the run has rope_type=rope, under which it changes "
                              "nothing; Megatron-LM's default is yarn: give --rope-type yarn for its model, or leave "
                              f"--{name.replace('_', '-')} out")


def _problems(flag: MegatronFlag, values: Sequence[str]) -> list[str]:
    """What is wrong with a flag that is refused, or that has a value which means something else than what is done."""
    if flag.fate == REFUSED:
        return [f"{flag.name} is not supported: {flag.text}"]
    taken = [number for number in map(_number, flag.values) if number is not None]
    return [f"{flag.name} {value} is not supported, only {' or '.join(flag.values)}: {flag.text}"
            for value in (values if flag.values else ()) if value not in flag.values and _number(value) not in taken]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _value_of(run: RunConfig, field: str) -> Any:
    return next(getattr(section, field) for section in vars(run).values() if hasattr(section, field))


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


# -- what each translated flag becomes; arguments: name, its words, the run so far, all given flags --


def _integer(name: str, values: Sequence[str]) -> int:
    number = whole_number(values[0])
    if number is None:
        raise ConfigError(f"argument {name}: invalid int value: {values[0]!r}; see --help")
    return number


def _renamed(field: str) -> Callable[..., dict[str, Any]]:
    return lambda name, values, run, given: {field: _integer(name, values)}


def _dense_layers(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    layers, way_out = run.model.num_layers, "use --num-dense-layers"
    try:
        pattern = _pattern(ast.parse(values[0].strip(), mode="eval").body)
        if pattern == 0:
            raise ValueError("every 0th layer")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{name} {values[0]} must be a whole number or a sum of lists such as ([0]*3+[1]*58), a "
                          f"number for each of num_layers={layers} layers; {way_out}") from None
    if isinstance(pattern, int):
        pattern = [1 if number % pattern == 0 else 0 for number in range(layers)]
    dense = pattern.index(1) if 1 in pattern else len(pattern)
    if len(pattern) != layers:
        raise ConfigError(f"{name} {values[0]} has {len(pattern)} numbers for num_layers={layers} layers; {way_out}")
    if pattern != [0] * dense + [1] * (layers - dense):
        raise ConfigError(f"{name} {values[0]}: dense layers come before all MoE layers here; {way_out}")
    return {"num_dense_layers": dense}


def _pattern(node: ast.expr) -> Any:
    """The value of a sum and product of lists and whole numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= MAX_LAYERS:
        return node.value
    if isinstance(node, ast.List):
        return [_pattern(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern(node.left), _pattern(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            product = left * right
            if len(product) <= MAX_LAYERS:
                return product
    raise ValueError("no pattern of layers")


def _shared_experts(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    width, one = _integer(name, values), run.model.moe_ffn_hidden_size
    if width % one:
        raise ConfigError(f"{name} {width} must be a multiple of moe_ffn_hidden_size={one}: shared experts are as wide "
                          "as the others; use --num-shared-experts")
    return {"num_shared_experts": width // one}


def _samples(field: str) -> Callable[..., dict[str, Any]]:
    def translate(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        batch = run.training.global_batch_size
        steps = _integer(name, values) // batch
        if steps < 1 and field != "lr_warmup_iters":
            raise ConfigError(f"{name} {values[0]} is less than one step of global_batch_size={batch}")
        return {field: steps}

    return translate


def _warmup_fraction(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    share, training = _number(values[0]), run.training
    if share is None or not 0 <= share <= 1:
        raise ConfigError(f"{name} {values[0]} must be between 0 and 1; or use --lr-warmup-iters")
    return {"lr_warmup_iters": int(share * (training.lr_decay_iters or training.train_iters))}


def _blockwise(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    recipe, form = given.get("--fp8-recipe", ["delayed"])[0], given.get("--fp8-format", ["none"])[0]
    if (recipe, form) != ("blockwise", "e4m3"):
        raise ConfigError(f"{name} {values[0]}: FP8 is --fp8-recipe blockwise with --fp8-format e4m3 here, both given, "
                          f"not {recipe} with {form}; or use --fp8 blockwise")
    return {"fp8": "blockwise"}


def _divides_vocabulary(name: str, values: list[str], run: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    multiple, rows = _integer(name, values), run.model.vocab_size
    if multiple < 1 or rows % multiple:
        raise ConfigError(f"{name} {values[0]} must divide vocab_size={rows}, which counts rows with padding here: "
                          "give --vocab-size, the tokenizer's ids rounded up to a multiple of it (129280 of "
                          "DeepSeek-V3's), or leave the flag out")
    return {}


_TRANSLATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "--qk-head-dim": _renamed("qk_nope_head_dim"),
    "--qk-pos-emb-head-dim": _renamed("qk_rope_head_dim"),
    "--moe-layer-freq": _dense_layers,
    "--moe-shared-expert-intermediate-size": _shared_experts,
    "--bf16": lambda name, values, run, given: {"precision": "bf16"},
    "--train-samples": _samples("train_iters"),
    "--lr-decay-samples": _samples("lr_decay_iters"),
    "--lr-warmup-samples": _samples("lr_warmup_iters"),
    "--lr-warmup-fraction": _warmup_fraction,
    "--train-data-path": lambda name, values, run, given: {"data_path": list(values)},
    "--fp8-recipe": _blockwise,
    "--fp8-format": _blockwise,
    "--make-vocab-size-divisible-by": _divides_vocabulary,
}
