"""An evaluation before anything is allocated: what is planned, what is refused; and how its result is printed."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dsv3_megatron.checkpoint.folder import RunProgress, begin_save, finish_save
from dsv3_megatron.commands import evaluate as command
from dsv3_megatron.commands.evaluate import EvaluationRequest, as_json, as_text, carry_out, check_request
from dsv3_megatron.config.data import DOCUMENT_SWITCHES, DataConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.data.indexed_writer import DatasetWriter
from dsv3_megatron.data.tokenizer import EOS_TOKEN, save_tokenizer
from dsv3_megatron.runs.evaluator import Evaluation, RowSamples
from tests.hugging_face import config_json, published_weights, write_checkpoint
from tests.parity.architectures import variant

PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `run`, a checkpoint of `tiny` without tensors; `valid`, 1000 tokens; `ids.npy`, 6 rows of 11."""
    write_run(tmp_path / "run", preset("tiny"))
    with DatasetWriter(str(tmp_path / "valid"), vocab_size=2048) as writer:
        writer.add_documents(np.arange(1000), np.array([400, 600]))
    np.save(tmp_path / "ids.npy", np.arange(66, dtype=np.int32).reshape(6, 11))
    return tmp_path


def write_run(directory: Path, run: RunConfig, model: dict[str, Any] | None = None) -> None:
    (begin_save(directory, 7) / "__0_0.distcp").write_text("tensors")
    content = run.as_dict()
    content["model"] |= model or {}
    finish_save(directory, RunProgress(7, 56, 56 * 256), content, versions={}, world_size=4, precision="bf16")


def plan(folder: Path, world_size: int = 1, **request: Any) -> Any:
    for name in ("data_path", "tokens", "logprobs"):
        if name in request:
            request[name] = str(folder / request[name])
    return check_request(EvaluationRequest(load=str(folder / request.pop("load", "run")), **request), world_size)


class TestPlan:
    def test_a_dataset_as_the_run_was_trained(self, folder: Path) -> None:
        found = plan(folder, data_path="valid")
        assert found.run.model == preset("tiny").model
        assert found.run.training.seq_length == 256 and found.run.training.precision == "bf16"
        assert len(found.rows) == 4 and len(found.rows[3]) == 1000 - 3 * 256

    def test_texts_that_begin_otherwise_than_in_training(self, folder: Path) -> None:
        assert "texts here" not in plan(folder, data_path="valid").documents
        (folder / "run" / "iter_0000007" / "text_form.json").write_text('{"begin_ids": [0], "end_ids": []}')
        line = plan(folder, data_path="valid").documents
        assert line.endswith("; texts here have no ids around them, those of training begin with 0")

    def test_an_array(self, folder: Path) -> None:
        found = plan(folder, tokens="ids.npy", logprobs="out.npy", precision="fp32", micro_batch_size=2)
        training = found.run.training
        assert (training.seq_length, training.precision, training.global_batch_size) == (10, "fp32", 2)
        assert not (folder / "out.npy").exists()

    @pytest.mark.parametrize("world_size, parallel, micro_batch_size, seq_length, rows", [
        (1, {}, 1, 10, 1),
        (2, {}, 2, 10, 4),  # two replicas
        (1, {}, 1_000_000, 10, 6),  # no more rows in a pass than there are
        (2, {}, 1_000_000, 10, 6),
        (2, PP2, 1_000_000, 10, 6),
        (2, PP2, 1, 10, 6),  # no more micro-batches than rows
        (2, PP2, 2, 10, 6),
        (2, {**PP2, "num_virtual_stages_per_pipeline_rank": 2}, 2, 10, 8),  # 3 micro-batches become a multiple of 2
        (4, {"tensor_model_parallel_size": 4}, 1, 12, 1),  # a sequence is cut into four
        (4, {**PP2, "expert_model_parallel_size": 2}, 1, 10, 6),
    ])
    def test_rows_of_a_step(self, folder: Path, world_size, parallel, micro_batch_size, seq_length, rows) -> None:
        found = plan(folder, world_size, tokens="ids.npy", parallel=parallel, micro_batch_size=micro_batch_size)
        assert (found.run.training.seq_length, found.run.training.global_batch_size) == (seq_length, rows)

    def test_a_pipeline_is_filled(self, folder: Path) -> None:
        np.save(folder / "many.npy", np.zeros((100, 5), np.int64))
        assert plan(folder, 2, tokens="many.npy", parallel=PP2).run.training.num_microbatches(1) == 8

    def test_a_hugging_face_checkpoint(self, folder: Path) -> None:
        model = variant("groups", mtp_num_layers=0)
        write_checkpoint(folder / "hf", config_json(model), published_weights(model))
        np.save(folder / "small.npy", np.zeros((2, 5), np.int64))
        found = plan(folder, load="hf", tokens="small.npy")
        assert found.load is not None and found.run.training.precision == "auto"
        assert found.run.model.num_experts == model.num_experts

    @pytest.mark.parametrize("request_, world_size, message", [
        ({}, 1, "either --data-path PREFIX or --tokens FILE.npy"),
        ({"data_path": "valid", "tokens": "ids.npy"}, 1, "either --data-path PREFIX or --tokens FILE.npy"),
        ({"tokens": "ids.npy", "load": "none"}, 1, "none does not exist; give a folder of checkpoints"),
        ({"tokens": "ids.npy", "load": "."}, 1, "holds no checkpoint: neither latest_checkpointed_iteration.txt, as "
         "runs write it, nor config.json"),
        ({"tokens": "ids.npy", "micro_batch_size": 0}, 1, "micro_batch_size=0 must be at least 1"),
        ({"tokens": "ids.npy", "seq_length": 8}, 1, "seq_length=8 cuts a dataset into rows; an array has its own"),
        ({"data_path": "valid", "logprobs": "out.npy"}, 1, "--logprobs goes with --tokens FILE.npy"),
        ({"data_path": "valid", "seq_length": 257}, 1, "seq_length=257 must lie in 1..256"),
        ({"data_path": "valid", "seq_length": 0}, 1, "seq_length=0 must lie in 1..256"),
        ({"data_path": "nothing"}, 1, "nothing.idx does not exist"),
        ({"tokens": "nothing.npy"}, 1, "nothing.npy: no such file"),
        ({"tokens": "ids.npy", "logprobs": "ids.npy"}, 1, "ids.npy exists; remove it, or give another name"),
        ({"tokens": "ids.npy", "logprobs": "no/out.npy"}, 1, "the folder .*no does not exist; make it first"),
        ({"tokens": "ids.npy", "parallel": PP2}, 3, "= 2 must divide world_size=3"),
        ({"tokens": "ids.npy", "parallel": {"expert_model_parallel_size": 3}}, 3,
         "expert_model_parallel_size=3 must divide num_experts=8"),
        ({"tokens": "ids.npy", "parallel": {"tensor_model_parallel_size": 0}}, 1,
         "tensor_model_parallel_size=0 must be at least 1"),
        ({"tokens": "ids.npy", "parallel": {**PP2, "pipeline_model_parallel_layout": "Ett|t"}}, 2,
         "pipeline_model_parallel_layout"),
    ], ids=str)
    def test_what_is_refused(self, folder: Path, request_, world_size, message) -> None:
        with pytest.raises(ValueError, match=message):
            plan(folder, world_size, **request_)

    def test_a_checkpoint_of_another_version(self, folder: Path) -> None:
        write_run(folder / "newer", preset("tiny"), {"attention_sinks": 4})
        with pytest.raises(ValueError, match="attention_sinks, which this version does not know"):
            plan(folder, load="newer", tokens="ids.npy")

    def test_a_truncated_checkpoint(self, folder: Path) -> None:
        (folder / "run" / "iter_0000007" / "checkpoint.json").write_text("{")
        with pytest.raises(ValueError, match="iter_0000007 is truncated or corrupt"):
            plan(folder, tokens="ids.npy")


def save_word_tokenizer(folder: Path, *, eod_id: int) -> str:
    words = {f"word{number}": number for number in range(3) if number != eod_id}
    save_tokenizer(Tokenizer(WordLevel({**words, EOS_TOKEN: eod_id}, unk_token="word0")), folder)
    return str(folder)


class TestDocuments:
    """`isolated`, a run that was trained with every switch on `train`, whose sidecar says that documents end with 1."""

    @pytest.fixture
    def isolated(self, folder: Path) -> Path:
        made = {"train": {"append_eod": True, "eod_id": 1}, "silent": {}, "open": {"append_eod": False}}
        for name, options in made.items():
            with DatasetWriter(str(folder / name), vocab_size=2048, options=options) as writer:
                writer.add_documents(np.array([5, 1] * 200), np.array([2] * 200))
        write_run(folder / "isolated", preset("tiny").override(
            **dict.fromkeys(DOCUMENT_SWITCHES, True), data_path=["1", f"{folder}/train"]))
        return folder

    @pytest.mark.parametrize("request_, on, line", [
        ({}, DOCUMENT_SWITCHES, "documents: reset_attention_mask and reset_position_ids and eod_mask_loss at EOD 1, as "
         "in training"),
        ({"switches": {"eod_mask_loss": False}}, DOCUMENT_SWITCHES[:2], "documents: reset_attention_mask and "
         "reset_position_ids at EOD 1; trained with reset_attention_mask and reset_position_ids and eod_mask_loss"),
        ({"switches": dict.fromkeys(DOCUMENT_SWITCHES, False)}, (), "documents: packed, nothing keeps them apart; "
         "trained with reset_attention_mask and reset_position_ids and eod_mask_loss"),
        ({"load": "run"}, (), "documents: packed, nothing keeps them apart, as in training"),
        ({"load": "run", "switches": {"reset_attention_mask": True}}, ("reset_attention_mask",),
         "documents: reset_attention_mask at EOD 1; trained packed"),
    ])
    @pytest.mark.parametrize("what", ["dataset", "array"])
    def test_as_trained_unless_given(self, isolated: Path, request_, on, line, what) -> None:
        asked = {"load": "isolated", **request_}
        asked |= {"data_path": "train.bin"} if what == "dataset" else {"tokens": "ids.npy"}
        if what == "array" and asked["load"] == "run" and on:
            asked["tokenizer_model"] = save_word_tokenizer(isolated / "words", eod_id=1)
        found = plan(isolated, **asked)
        assert found.run.data == DataConfig(**dict.fromkeys(on, True))
        assert (found.eod_id, found.documents) == (1 if on else None, line)

    def test_the_tokenizer_of_the_run_says_the_eod_where_the_data_does_not(self, isolated: Path) -> None:
        words = save_word_tokenizer(isolated / "words", eod_id=1)
        run = preset("tiny").override(reset_attention_mask=True, tokenizer_model=words, data_path=[f"{isolated}/gone"])
        write_run(isolated / "named", run)
        for asked in ({"data_path": "silent"}, {"tokens": "ids.npy"}):
            assert plan(isolated, load="named", **asked).eod_id == 1
        # The tokenizer that is given goes before what training says; in a dataset its sidecar goes before both.
        other = save_word_tokenizer(isolated / "other", eod_id=2)
        assert plan(isolated, load="isolated", tokens="ids.npy", tokenizer_model=other).eod_id == 2
        assert plan(isolated, load="isolated", data_path="train", tokenizer_model=other).eod_id == 1

    def test_a_hugging_face_folder_has_a_tokenizer_and_no_switches(self, folder: Path) -> None:
        model = variant("groups", mtp_num_layers=0)
        write_checkpoint(folder / "hf", config_json(model), published_weights(model))
        np.save(folder / "small.npy", np.zeros((2, 5), np.int64))
        asked = {"load": "hf", "tokens": "small.npy"}
        assert plan(folder, **asked).documents == "documents: packed, nothing keeps them apart"
        switches = {"eod_mask_loss": True}
        with pytest.raises(ValueError, match=r"^eod_mask_loss=True, but nothing says which token ends a document "
                           r"\(EOD\): give the tokenizer, --tokenizer-model DIR, or leave it off$"):
            plan(folder, **asked, switches=switches)
        save_word_tokenizer(folder / "hf", eod_id=2)
        found = plan(folder, **asked, switches=switches)
        assert (found.eod_id, found.documents) == (2, "documents: eod_mask_loss at EOD 2")

    def test_switches_of_training_fall_away_from_an_array_without_an_eod(self, folder: Path) -> None:
        write_run(folder / "lost", preset("tiny").override(
            reset_attention_mask=True, tokenizer_model=f"{folder}/gone", data_path=[f"{folder}/gone"]))
        found = plan(folder, load="lost", tokens="ids.npy")
        assert (found.run.data, found.eod_id) == (DataConfig(), None)
        assert found.documents == (
            "documents: packed, nothing keeps them apart; trained with reset_attention_mask; nothing says which token "
            "ends a document (EOD): give the tokenizer, --tokenizer-model DIR")
        with pytest.raises(ValueError, match="^eod_mask_loss=True, but nothing says which token"):
            plan(folder, load="lost", tokens="ids.npy", switches={"eod_mask_loss": True})

    @pytest.mark.parametrize("request_, message", [
        ({"data_path": "silent"}, r"which has no sidecar with an eod_id: give the tokenizer .* leave .* off \(as in "
         r"training; here --no-reset-attention-mask --no-reset-position-ids --no-eod-mask-loss\)$"),
        ({"data_path": "open", "switches": {"reset_position_ids": True}}, r"open was made without --append-eod: .*off "
         r"\(as in training; here --no-reset-attention-mask --no-eod-mask-loss\)$"),
        ({"load": "run", "data_path": "open", "switches": {"eod_mask_loss": True}}, "or leave eod_mask_loss off$"),
        ({"data_path": "train", "transformer_impl": "transformer_engine"}, "^reset_attention_mask=True and "
         "reset_position_ids=True cannot go with transformer_impl=transformer_engine"),
        ({"tokens": "ids.npy", "tokenizer_model": "nowhere"}, "tokenizer_model=nowhere: nowhere does not exist"),
    ])
    def test_what_is_refused(self, isolated: Path, request_, message) -> None:
        with pytest.raises(ValueError, match=message):
            plan(isolated, **{"load": "isolated", **request_})

    def test_a_tokenizer_of_another_vocabulary(self, isolated: Path) -> None:
        words = save_word_tokenizer(isolated / "words", eod_id=2048)
        with pytest.raises(ValueError, match=r"has id 2048; it must lie in 0\.\.2047 \(the model's vocab_size=2048\)"):
            plan(isolated, load="isolated", tokens="ids.npy", tokenizer_model=words)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_first_rank_says_what_is_in_force(self, isolated: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str], rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("dsv3_megatron.commands.evaluate._evaluate", lambda plan, rank: {"": RESULT})
        assert carry_out(EvaluationRequest(load=f"{isolated}/isolated", data_path=f"{isolated}/train")) == 0
        captured = capsys.readouterr()
        assert captured.err.count("at EOD 1, as in training\n") == captured.err.count("\n") == 1 - rank


class TestCommand:
    def test_flags_become_a_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[EvaluationRequest] = []
        monkeypatch.setattr(command, "carry_out", lambda request: seen.append(request) or 0)
        assert command.main(["--load", "c", "--tokens", "t.npy", "--logprobs", "l.npy", "--json", "--micro-batch-size",
                             "3", "--pipeline-model-parallel-size", "2", "--precision", "fp32"]) == 0
        assert seen == [EvaluationRequest(load="c", tokens="t.npy", logprobs="l.npy", micro_batch_size=3,
                                          precision="fp32", parallel=PP2, as_json=True)]

    def test_datasets_with_names_are_evaluated_apart(self, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(command, "carry_out", lambda *given: seen.append(given) or 0)
        assert command.main(["--load", "c", "--data-path", "code=a/b", "web=c.bin"]) == 0
        assert seen == [(EvaluationRequest(load="c"), {"code": "a/b", "web": "c"})]
        for words, message in ((["code=a", "b"], "data_path=code=a b gives 2 datasets to code, and every token of "),
                               (["a", "b"], "data_path=a b gives 2 datasets, and every token of a dataset is "),
                               (["0.5", "a"], "data_path=0.5 a gives 1 datasets, and every token"),
                               (["a", "code=b"], "data_path=a code=b gives a name to some (code=) and none to a: ")):
            assert command.main(["--load", "c", "--data-path", *words]) == 2
            assert f"error: {message}" in capsys.readouterr().err

    def test_results_of_several_datasets_are_printed_by_name(self) -> None:
        results = {"code": RESULT, "web": dataclasses.replace(RESULT, loss=1.0)}
        blocks = command._printed(results, is_json=False).split("\n\n")
        assert [block.splitlines()[0] for block in blocks] == ["code", "web"]
        assert blocks[1].splitlines()[1] == "loss        1.000000 nats/token"
        found = json.loads(command._printed(results, is_json=True))
        assert found == {"code": json.loads(as_json(RESULT)), "web": json.loads(as_json(results["web"]))}

    def test_switches_that_are_not_given_are_not_requested(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[EvaluationRequest] = []
        monkeypatch.setattr(command, "carry_out", lambda request: seen.append(request) or 0)
        command.main(["--load", "c", "--data-path", "p", "--reset-attention-mask", "--no-eod-mask-loss",
                      "--tokenizer-model", "t"])
        assert seen[0].switches == {"reset_attention_mask": True, "eod_mask_loss": False}
        assert seen[0].tokenizer_model == "t"

    @pytest.mark.parametrize("arguments, message", [
        (["--tokens", "t.npy"], "error: the following arguments are required: --load; see --help"),
        (["--load", "c", "--tokens", "t.npy", "--micro-batch-size", "x"], "invalid int value: 'x'"),
        (["--load", "c", "--data-pat", "p"], "unrecognized arguments: --data-pat p"),
        (["--load", "c", "--data-path", "p"], "error: load=c does not exist"),
    ])
    def test_one_line_says_what_is_wrong(self, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1

    def test_whoever_meets_it_says_it(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                      ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert command.main(["--load", "c", "--data-path", "p"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: load=c does not exist")
        assert said.endswith(f" (rank 1 of 2, on {socket.gethostname()})\n")

    @pytest.mark.parametrize(("variables", "message"), [
        ({"RANK": "0"}, "RANK='0' is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2' must be a whole number from 0 to 1 (WORLD_SIZE=2)"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' must be a whole number from 0 to 1 (WORLD_SIZE=2)"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK='1' must be a whole number from 0 to 0"),
    ])
    def test_variables_that_cannot_be(self, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert command.main(["--load", "c", "--data-path", "p"]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


RESULT = Evaluation(loss=math.log(8.0), mtp_losses=(2.5, 3.5), tokens=60, rows=6)


def test_text() -> None:
    assert as_text(RESULT).splitlines() == [
        "loss        2.079442 nats/token", "perplexity  8.0000", "tokens      60 in 6 rows",
        "mtp_1 loss  2.500000 nats/token", "mtp_2 loss  3.500000 nats/token",
        "            MTP losses are sums divided by all 60 tokens, as in training: a row's last positions, without a "
        "target, add nothing"]


def test_json_says_null_where_a_number_is_none() -> None:
    assert json.loads(as_json(RESULT)) == {"loss": RESULT.loss, "perplexity": pytest.approx(8.0), "tokens": 60,
                                           "rows": 6, "mtp_losses": [2.5, 3.5]}
    infinite = json.loads(as_json(dataclasses.replace(RESULT, loss=1000.0, mtp_losses=(math.nan,))))
    assert infinite["perplexity"] is None and infinite["mtp_losses"] == [None] and infinite["loss"] == 1000.0


def test_samples_of_rows_fill_whole_steps() -> None:
    samples = RowSamples([np.array([5, 6, 7]), np.array([8, 9], np.uint16)], seq_length=4, num_rows_per_step=3)
    assert len(samples) == 3
    first, second, added = (samples[index] for index in range(3))
    assert first["tokens"].tolist() == [5, 6, 7, 0] and first["labels"].tolist() == [6, 7, 0, 0]
    assert [sample["loss_mask"].tolist() for sample in (first, second, added)] == [
        [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert second["labels"][0] == 9 and first["position_ids"].tolist() == [0, 1, 2, 3]


def test_samples_of_rows_restart_and_mask_after_an_eod() -> None:
    """A row that is filled up, an EOD at its end that predicts, one that is predicted only."""
    rows = [np.array([5, 1, 6, 7, 1, 8]), np.array([1, 1, 9, 1])]
    data = DataConfig(reset_position_ids=True, eod_mask_loss=True)
    samples = [RowSamples(rows, seq_length=5, num_rows_per_step=2, data=data, eod_id=1)[index] for index in range(2)]
    assert [sample["position_ids"].tolist() for sample in samples] == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]
    assert [sample["loss_mask"].tolist() for sample in samples] == [[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    off = RowSamples(rows, seq_length=5, num_rows_per_step=2, data=DataConfig(), eod_id=1)[0]
    assert off["position_ids"].tolist() == [0, 1, 2, 3, 4] and off["loss_mask"].tolist() == [1] * 5
