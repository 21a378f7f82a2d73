"""How far log-probabilities as generated are from those of the training forward on the same tokens, bit by bit.

    python -m tools.experiments.generation_agreement --load runs/quickstart/checkpoints

Some sequences are generated greedily, one token a step. Then the same tokens are computed again as generation would in
other settings (cache, batch, two tokens a step as with drafts), and by the training forward, whole sequences at once.
The first table has, for each setting, the share of tokens whose log-probability has the bits of the training forward's,
and the largest difference. The training forward sums as that of dsv3 grpo, and with --plain as that of dsv3 train. The
second one says for products of one weight whether a row's result depends on how many rows are computed with it: where
it does, no order of the sums elsewhere could give equal bits.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from dsv3_megatron import Model
from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.streams import run_command
from dsv3_megatron.generation.cache import KV_CACHES
from dsv3_megatron.generation.forward import CachedModel, Prompts
from dsv3_megatron.model.steady_modules import set_steady

_PROMPT = 16
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def logprobs_of(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token behind the prompt, fp32 [B, S - prompt], of the logits of the position before."""
    scores = torch.log_softmax(logits_BSV.float()[:, _PROMPT - 1:-1], dim=-1)
    return scores.gather(-1, tokens_BS[:, _PROMPT:, None]).squeeze(-1)


def generated(cached: CachedModel, tokens_BS: torch.Tensor, *, kind: str, batch: int, width: int) -> torch.Tensor:
    """Logits [B, S, V] of given tokens as decoding computes them: `width` tokens a step, `batch` sequences at once."""
    parts = []
    for rows in tokens_BS.split(batch):
        cache = cached.new_cache(kind, num_rows=len(rows), capacity=rows.shape[1])
        prompts = Prompts.pack([row[:_PROMPT].tolist() for row in rows], cached.device)
        hidden = cached.prefill(prompts, cache).view(len(rows), _PROMPT, -1)
        logits = [cached.logits(hidden, least_rows=cache.least_rows)]
        for at in range(_PROMPT, rows.shape[1], width):
            new = rows[:, at: at + width]
            hidden = cached.decode(new, [at] * len(rows), cache).transpose(0, 1)
            logits.append(cached.logits(hidden, least_rows=cache.least_rows))
        parts.append(torch.cat(logits, dim=1))
    return torch.cat(parts)


def sequences(cached: CachedModel, count: int, length: int) -> torch.Tensor:
    """Greedy continuations of random prompts, int64 [count, length]."""
    vocabulary = cached.embedding.shape[0]
    tokens_BS = torch.randint(0, vocabulary, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    cache = cached.new_cache("latent", num_rows=count, capacity=length)
    hidden = cached.prefill(Prompts.pack(tokens_BS.tolist(), cached.device), cache).view(count, _PROMPT, -1)
    last = hidden[:, -1]
    for at in range(_PROMPT, length):
        tokens_BS = torch.cat([tokens_BS, cached.logits(last).argmax(-1, keepdim=True)], dim=1)
        last = cached.decode(tokens_BS[:, -1:], [at] * count, cache)[0]
    return tokens_BS


def settings(count: int) -> Iterator[tuple[str, dict[str, object]]]:
    """The settings of generation that are compared, by name."""
    for kind in KV_CACHES:
        for batch in (1, count):
            for width in (1, 2):
                yield (f"{kind} cache, {batch} at a time, {width} token{'s' * (width > 1)} a step",
                       {"kind": kind, "batch": batch, "width": width})


def compare(model: Model, count: int, length: int, *, is_steady: bool) -> list[dict[str, object]]:
    """The first table: rows of name, share of equal bits and largest difference."""
    (stage,) = model._alive().stages
    set_steady([stage], is_steady)
    cached = CachedModel(stage.eval())
    with torch.inference_mode():
        tokens_BS = sequences(cached, count, length)
        expected = logprobs_of(model.logits(tokens_BS.numpy()), tokens_BS)
        found = {name: generated(cached, tokens_BS, **given) for name, given in settings(count)}  # type: ignore[arg-type]
    found["training forward, 1 at a time"] = torch.cat([model.logits(row[None].numpy()) for row in tokens_BS])
    cut = torch.zeros(count, length, model.config.vocab_size)
    for stop in range(_PROMPT, length):
        cut[:, stop - 1] = model.logits(tokens_BS[:, :stop].numpy())[:, -1]
    found["training forward, without the tokens to come"] = cut
    table = []
    for name, logits_BSV in found.items():
        actual = logprobs_of(logits_BSV, tokens_BS)
        table.append({"setting": name, "equal": float((actual == expected).double().mean()),
                      "largest difference": float((actual - expected).abs().max())})
    return table


def products(weight: torch.Tensor) -> list[dict[str, object]]:
    """The second table: whether rows of a product have the bits that they have among 512 rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS[-1], weight.shape[1], generator=generator).to(weight.dtype)
    whole = x @ weight.t()
    return [{"rows": rows, "equal": float(((x[:rows] @ weight.t()) == whole[:rows]).double().mean())}
            for rows in _ROWS]


def main(arguments: list[str] | None = None) -> int:
    """Print both tables for fp32 and bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="checkpoints of a run")
    parser.add_argument("--sequences", type=int, default=8, help="sequences (8)")
    parser.add_argument("--length", type=int, default=80, help="tokens of each, the prompt's 16 included (80)")
    parser.add_argument("--plain", action="store_true", help="let the training forward sum as is fastest")
    options = parser.parse_args(arguments)
    results = {}
    for precision in ("fp32", "bf16"):
        with Model.load(options.load, precision=precision) as model:
            (stage,) = model._alive().stages
            results[precision] = {"log-probabilities": compare(model, options.sequences, options.length,
                                                               is_steady=not options.plain),
                                  "products": products(stage.output_layer.weight.detach())}
    print(json_text(results, indent=2))
    return 0


if __name__ == "__main__":
    run_command(main)
