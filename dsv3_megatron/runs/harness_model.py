"""A model as lm-evaluation-harness asks it: the class `dsv3` among the harness's models.

The harness reads tasks, makes requests and sums up; this class answers the requests. Texts are divided into tokens, and
windows of a long one are cut, as the harness's own `hf` model does it, so that both see the same tokens of an exported
checkpoint: a text begins as those of the training did, which is what the export's tokenizer says.

    lm_eval.simple_evaluate(HarnessModel.open("checkpoints"), tasks=["hellaswag"])

Source of the interface: lm_eval.api.model (lm-eval 0.4). It is imported here, so this module needs the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.data.chat.conversation import Conversation
from dsv3_megatron.data.chat.template import ChatTemplate, find_chat_template
from dsv3_megatron.generation.continuations import ContinuationRequest
from dsv3_megatron.generation.generator import Options
from dsv3_megatron.generation.sampling import Sampling
from dsv3_megatron.metrics.parameters import count_parameters
from dsv3_megatron.platform import prepare
from dsv3_megatron.runs.answering_run import check_answering_run
from dsv3_megatron.runs.shared_model import SharedModel

# What the harness's models generate where a task does not say it.
_DEFAULT_NEW_TOKENS = 256
_AUTO = "auto"
# Settings of a task that say nothing where the likeliest token is taken.
_OF_SAMPLING = {"top_k", "top_p", "min_p", "typical_p"}
# Settings that name the only thing that is done here.
_ALLOWED_VALUES = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}


@register_model("dsv3")
class HarnessModel(TemplateLM):
    """Answers the harness's requests with a model of this library.

    Args:
        model: The model, in the process that asks.
        batch_size: Sequences that go through the model together, or "auto": as many as fill its context.

    Attributes:
        was_asked: Whether the harness has come as far as to ask the model.

    Raises:
        ConfigError: a batch size that cannot be.
    """

    def __init__(self, model: SharedModel, *, batch_size: int | str = 1) -> None:
        super().__init__()
        self.model, self.codec = model, model.codec
        self.batch_size = parse_batch_size(batch_size)
        self.was_asked = False
        self._template: ChatTemplate | None = None

    @classmethod
    def open(cls, load: str, *, tokenizer_model: str | None = None, precision: str | None = None,
             batch_size: int | str | None = 1, max_length: int | None = None) -> HarnessModel:
        """A checkpoint's model in this process alone.

        Args:
            load: Folder of a run's checkpoints, saved under any layout, or of a Hugging Face checkpoint.
            tokenizer_model: Folder of the tokenizer; None: the checkpoint's.
            precision: "auto", "bf16" or "fp32"; None: as the checkpoint was trained.
            batch_size: Sequences that go through the model together, or "auto".
            max_length: Most tokens that the model reads; None: its context.

        Raises:
            ValueError: the checkpoint or the tokenizer cannot be used.
        """
        prepare()
        checked = check_answering_run(load, tokenizer_model=tokenizer_model, precision=precision, max_length=max_length)
        return cls(checked.build(), batch_size=batch_size or 1)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
                            ) -> HarnessModel:
        """What the harness calls for `model="dsv3"`: `open` with the arguments of `--model_args`."""
        given = {name: value for name, value in (additional_config or {}).items() if name == "batch_size"}
        return cls.open(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessModel:
        """What the harness calls for arguments in one text, such as "load=checkpoints,precision=fp32"."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    def __repr__(self) -> str:
        return "dsv3"

    # ---- tokens -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ConfigError: nothing ends one.
        """
        if self.codec.eos_id is not None:
            return self.codec.eos_id
        if not self.codec.stop_ids:
            raise ConfigError(f"nothing says which token ends a text: name eos_token in the tokenizer_config.json "
                              f"beside {self.codec.path}")
        return self.codec.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text which has nothing before it: bos_token if one is named."""
        return self.eot_token_id if self.codec.bos_id is None else self.codec.bos_id

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self.model.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a task that does not say how many."""
        return _DEFAULT_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, behind those that begin every one; without these where `add_special_tokens` is False."""
        if add_special_tokens is False:
            ids: list[int] = self.codec.tokenizer.encode(string, add_special_tokens=False).ids
            return ids
        return self.codec.encode(string)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.codec.tokenizer.decode(list(ids), skip_special_tokens=True))

    # ---- requests -----------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **others: Any) -> list[tuple[float, bool]]:
        self.was_asked = True
        asked = [ContinuationRequest(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        with tqdm(total=len(asked), desc="Scoring", unit="request", disable=disable_tqdm) as bar:
            scores = self.model.score(asked, batch_size=self.batch_size, report=bar.update)
        found = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, a long one in windows that predict each token once."""
        texts = [request.args[0] for request in requests]
        windows = [list(map(utils.make_disjoint_window, utils.get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1))) for text in texts]
        scores = iter(self._loglikelihood_tokens(
            [(None, *window) for window in itertools.chain.from_iterable(windows)], disable_tqdm))
        totals = [sum(logprob for logprob, _ in itertools.islice(scores, len(parts))) for parts in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What comes behind each text, up to the first text that ends it."""
        self.was_asked = True
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", unit="request", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                settings = requests[numbers[0]].args[1]
                texts = self._continue([str(requests[number].args[0]) for number in numbers], settings, bar)
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any], bar: Any) -> list[str]:
        """The answers to contexts that share their settings."""
        given = dict(normalize_gen_kwargs(settings, _DEFAULT_NEW_TOKENS))
        stops = handle_stop_sequences(given.pop("until", None), eos=self.codec.decode([self.eot_token_id]))
        max_new_tokens = int(given.pop("max_gen_toks"))
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(f"max_gen_toks={max_new_tokens} of a task must be less than the model's context, "
                              f"max_length={self.max_length}; give --gen_kwargs max_gen_toks=N")
        options = Options(max_new_tokens, self.max_length, _sampling(given), batch_size=self.batch_size or 1,
                          stop_ids=self.codec.stop_ids)
        prompts = [self.tok_encode(text)[-room:] for text in contexts]
        stops = [stop for stop in stops if stop]
        new = self.model.generate(prompts, options, stops, bar.update)
        return [str(postprocess_generated_text(self._decode(ids), stops, None)) for ids in new]

    # ---- chat ---------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's caches of requests."""
        return str(self.codec.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Text of the tokenizer's chat template, where one is asked for."""
        return self._chat().source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text that the model reads.

        Raises:
            ConfigError: the tokenizer has no template, the template fails, or the task begins the answer itself.
        """
        if not add_generation_prompt:
            raise ConfigError("this task begins the model's answer (gen_prefix), which is not there with a chat "
                              "template; leave out --apply_chat_template")
        try:
            return self._chat().render(Conversation(chat_history), add_generation_prompt=True)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            self._template = find_chat_template(self.codec.path)
        return self._template

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down of the model beside its numbers."""
        run = self.model.built.run
        return {"model_num_parameters": count_parameters(run.model).total, "model_dtype": self.model.built.precision,
                "model_sha": "", "model_revision": "", "num_processes": self.model.num_ranks}


def parse_batch_size(given: int | str) -> int | None:
    """Sequences of a pass; None for as many as fill the context.

    Raises:
        ConfigError: neither a number from 1 on nor "auto".
    """
    if str(given).partition(":")[0] == _AUTO:
        return None
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size={given} must be a number from 1 on, or auto")
    return size


def _sampling(given: dict[str, Any]) -> Sampling:
    """How tokens are chosen, of a task's settings.

    Raises:
        ConfigError: a setting that is not known here.
    """
    is_drawn = bool(given.pop("do_sample", False))
    temperature = float(given.pop("temperature", 0.0) or 0.0) if is_drawn else 0.0
    top_p = float(given.pop("top_p", 1.0)) if is_drawn and temperature else 1.0
    other = {name: value for name, value in given.items()
             if not (not temperature and name in _OF_SAMPLING) and _ALLOWED_VALUES.get(name, ...) != value}
    other.pop("temperature", None)
    if other:
        names = ", ".join(f"{name}={value}" for name, value in other.items())
        raise ConfigError(f"a task asks for {names}; generation here knows do_sample, temperature, top_p, until and "
                          "max_gen_toks: change the task's generation_kwargs")
    sampling = Sampling(temperature, top_p)
    sampling.validate()
    return sampling
