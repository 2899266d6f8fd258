"""Every example at toy size: they run, go on where they stopped, and draw what was found."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from examples import cost, demo, generate, recall, train
from examples.chart import LABEL, apart
from examples.data import EDGE, Corpus, hold_out, ledger, ledgers, marked, read
from examples.generate import document, largest_difference
from examples.model import MIXERS, Config, LanguageModel
from examples.page import Results, Training, page
from examples.progress import Progress
from examples.recall import Task
from examples.train import Run, Trainer, fit

SMALL = {"width": 32, "heads": 2}
CONTEXT = 96


@pytest.fixture(scope="module")
def corpus():
    return Corpus(ledgers(60), CONTEXT)


def trainer(corpus, mixer="kda", **run):
    chosen = {"steps": 6, "tokens": 192, "context": CONTEXT, "evaluations": 2, **run}
    return Trainer(Config(mixer, **SMALL), Run(**chosen), corpus)


# Data


def test_ledgers_are_the_same_everywhere_and_right():
    assert ledgers(3, seed=1) == ledgers(3, seed=1)
    assert ledgers(3, seed=1) != ledgers(3, seed=2)
    first = ledger(random.Random("0 0"))
    assert first.startswith("n=0 f=7 n?0 v=3 k=8 p=3 g=7")  # also on another machine
    verdicts = [verdict for _, verdict in marked(first)]
    assert verdicts.count("right") > 30
    assert set(verdicts) == {"", "right"}


def test_wrong_answers_are_noticed():
    assert list(marked("k=7 k?7 k=1 k?7 z?3")) == [
        ("k=7", ""),
        ("k?7", "right"),
        ("k=1", ""),
        ("k?7", "wrong"),
        ("z?3", "unknown"),
    ]


def test_documents_of_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nstill one\r\n\r\n\r\n\r\nsecond\n\n\nthird\n")
    assert read(path) == [b"one\ntwo\n\nstill one", b"second", b"third"]


def test_a_batch_is_pieces_with_what_follows_each_byte(corpus):
    inputs, targets, bounds = corpus.batch(250, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (1, 250)
    assert bounds[0] == 0
    assert bounds[-1] == 250
    assert bounds.diff().min() > 0
    text = b"\0" + b"\0\0".join(corpus.documents[0]) + b"\0"
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        piece = bytes([*inputs[0, start:stop].tolist(), int(targets[0, stop - 1])])
        assert piece in text
        assert bytes(targets[0, start:stop].tolist()) == piece[1:]


def test_held_out_is_whole_and_was_not_trained_on(corpus):
    trained, held_out = corpus.documents
    assert len(trained) == 57
    assert len(held_out) == 3
    targets = [batch[1][0] for batch in corpus.held_out_batches(100)]
    assert bytes(torch.cat(targets).tolist()) == b"".join(each + b"\0" for each in held_out)


def test_of_a_long_document_the_end_is_held_out():
    assert hold_out([b"one", b"long one"], 3) == ([b"one", b"long "], [b"one"])
    assert hold_out([b"one", b"two", b"six"], 7) == ([b"one"], [b"two", b"six"])


def test_bigram_loss_of_a_known_text():
    corpus = Corpus([b"ab" * 5000], context=100)
    assert corpus.bigram_loss() < 0.02  # b follows a, and a follows b; one edge
    noise = bytes(random.Random(0).choices(range(1, 5), k=40000))
    assert Corpus([noise], context=100).bigram_loss() == pytest.approx(math.log(4), abs=0.03)


def test_too_little_text():
    with pytest.raises(ValueError, match="text: expected at least two contexts of 64 bytes, got 9"):
        Corpus([b"too short"], 64)


# Model and training


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_packed_and_decodes(corpus, mixer):
    trained = trainer(corpus, mixer, steps=3)
    assert fit(trained)
    assert len(trained.losses) == 3
    model = trained.model.eval()
    inputs, _, bounds = corpus.batch(200, torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = model(inputs, cu_seqlens=bounds)
        spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        alone = torch.cat([model(inputs[:, start:stop]) for start, stop in spans], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    difference, largest = largest_difference(model, inputs[:, :130])
    assert difference < 1e-4 * max(largest, 1)


def test_training_learns_more_than_a_bigram():
    corpus = Corpus([b"the quick brown fox. " * 400], context=64)
    run = Run(steps=60, tokens=256, context=64, evaluations=1)
    trained = Trainer(Config("kda", **SMALL), run, corpus)
    fit(trained)
    assert trained.held_out[-1][1] < corpus.bigram_loss()


def test_bf16(corpus):
    trained = trainer(corpus, dtype="bf16", steps=30, learning_rate=1e-2)
    fit(trained)
    assert {x.dtype for x in trained.model.parameters()} == {torch.float32}
    assert trained.losses[-1] < trained.losses[0] - 1


def test_a_resumed_run_is_the_same_run(corpus, tmp_path):
    whole = trainer(corpus)
    fit(whole)
    first = trainer(corpus)
    for _ in range(3):
        first.advance()
    first.evaluate()
    first.save(tmp_path / "run.pt")
    torch.rand(7)  # what else happens does not matter
    second = trainer(corpus)
    second.load(tmp_path / "run.pt")
    fit(second)
    assert second.losses == whole.losses
    assert second.held_out == whole.held_out
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_disk_that_is_full(corpus, tmp_path, monkeypatch):
    """The checkpoint that is there stays whole, and of the other nothing is left."""
    path = tmp_path / "run.pt"
    trained = trainer(corpus)
    trained.save(path)
    before = path.read_bytes()

    def save(_, file):
        file.write(b"some")
        try:
            raise OSError("No space left on device")
        finally:
            raise RuntimeError("unexpected pos 97088 vs 96980")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(ValueError, match=r"run\.pt cannot be written: No space left on device"):
        trained.save(path)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before


def test_ctrl_c_leaves_a_checkpoint(corpus, tmp_path, monkeypatch):
    stopped, path = trainer(corpus), tmp_path / "run.pt"
    advance = stopped.advance

    def interrupted_at_the_second():
        if stopped.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return advance()

    monkeypatch.setattr(stopped, "advance", interrupted_at_the_second)
    handler = signal.getsignal(signal.SIGINT)
    assert not fit(stopped, path)
    assert signal.getsignal(signal.SIGINT) is handler
    again = trainer(corpus)
    again.load(path)
    assert again.step == 2
    assert fit(again, path)


def test_a_checkpoint_of_another_configuration(corpus, tmp_path):
    path = tmp_path / "run.pt"
    trainer(corpus).save(path)
    with pytest.raises(ValueError) as error:
        trainer(corpus, "lightning", steps=7).load(path)
    assert str(error.value) == (
        f"checkpoint: {path}: expected mixer lightning, steps 7, got mixer kda, steps 6"
    )
    with pytest.raises(ValueError, match="expected text checksum"):
        trainer(Corpus(ledgers(60, seed=1), CONTEXT)).load(path)


def test_commands(tmp_path, capsys):
    path = str(tmp_path / "run.pt")
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"a line about number {i}" for i in range(100)))
    sizes = ["--width", "32", "--steps", "4", "--tokens", "128", "--context", "32"]
    where = ["--text", str(text), "--checkpoint", path, "--device", "cpu"]
    command = ["--mixer", "linear", *sizes, *where]
    assert train.main(command) == 0
    assert "held-out loss of a bigram" in capsys.readouterr().out
    assert train.main(command) == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert train.main([*command, "--resume"]) == 0
    assert "going on from step 4" in capsys.readouterr().out
    arguments = [path, "--prompt", "a line", "--length", "20", "--device", "cpu"]
    assert generate.main(arguments) == 0
    written = capsys.readouterr().out
    assert written.startswith("a line")
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "text: expected a file, nowhere.txt is not one"),
        (["--resume"], "resume: expected --checkpoint with it"),
        (["--resume", "--checkpoint", "nowhere.pt"], "expected a file, nowhere.pt is not there"),
        (["--tokens", "0"], "tokens: expected at least 1, got 0"),
        (["--width", "33"], "width: expected a multiple of 2 heads, got 33"),
        (["--width", "0"], "width: expected at least 1, got 0"),
        (["--heads", "0"], "heads: expected at least 1, got 0"),
        (["--layers", "0"], "layers: expected at least 1, got 0"),
        (["--every", "0"], "every: expected at least 1, got 0"),
        (["--learning-rate", "nan"], "learning_rate: expected a finite number above 0, got nan"),
        (["--checkpoint", f"{__file__}/run.pt"], f"{__file__}/run.pt cannot be written"),
    ],
)
def test_wrong_arguments_are_one_error(capsys, arguments, message):
    assert train.main([*arguments, "--steps", "1", "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_text_that_cannot_be_read(monkeypatch, tmp_path, capsys):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    text = tmp_path / "text"
    text.write_text("a line")
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert train.main(["--text", str(text), "--steps", "1", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"error: [Errno 13] Permission denied: '{text}'\n"


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
@pytest.mark.parametrize("program", [train, generate, recall, cost, demo])
def test_a_device_that_is_not_here(capsys, program, device):
    arguments = ["any.pt"] if program is generate else []
    with pytest.raises(SystemExit) as stop:
        program.main([*arguments, "--device", device])
    assert stop.value.code == 2
    assert "argument --device: expected a device of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (recall, ["--length", "256"], "--length: expected more than 256, got 256"),
        (recall, ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (cost, ["--lengths", "64", "0"], "--lengths: expected at least 1, got 0"),
        (generate, ["any.pt", "--length", "-1"], "--length: expected at least 0, got -1"),
        (generate, ["any.pt", "--temperature", "nan"], "--temperature: expected a finite number"),
    ],
)
def test_numbers_out_of_range(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([*arguments, "--device", "cpu"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def _killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_whose_process_is_killed(monkeypatch, capsys):
    """As the system does with one that wants more memory than there is."""
    monkeypatch.setattr(cost, "measure", _killed)
    assert cost.main(["--lengths", "64", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("killed") == len(cost.OPERATORS)
    assert "chunk_kda forward and backward, T 64, float32: its process was killed" in printed.err


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert f"out: expected a file, {tmp_path} is a folder" in capsys.readouterr().err


def test_a_prompt_is_bytes(tmp_path, capsys):
    """Also those that are no text, which Python's arguments carry as surrogates."""
    path = tmp_path / "run.pt"
    trainer(Corpus([b"ab" * 500], 32), "linear", context=32).save(path)
    prompt = os.fsdecode(b"a\xff")
    assert generate.main([str(path), "--prompt", prompt, "--length", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "a\ufffd\n"


def test_what_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("no checkpoint")
    assert generate.main([str(path)]) == 2
    assert f"checkpoint: {path} cannot be read" in capsys.readouterr().err


def test_a_document_ends_at_its_edge():
    model = LanguageModel(Config("linear", **SMALL))
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = 1
        model.embedding.weight[EDGE, 0] = 100
        model.body.norm.weight.fill_(1)
    assert document(model, b"short", 50) == "short"


# Recall


def test_answers_are_what_was_written_last():
    variables, values, answers, ages = Task(length=50).draw(3, torch.Generator().manual_seed(0))
    for row in range(3):
        held: dict[int, tuple[int, int]] = {}
        for t in range(50):
            variable, value = int(variables[row, t]), int(values[row, t])
            if value:
                held[variable] = value, t
                assert answers[row, t] == -1
            else:
                assert held[variable] == (answers[row, t], t - ages[row, t])


def test_the_delta_rule_recalls_and_a_sum_does_less():
    task = Task(variables=4, values=4, length=128, batch=4, steps=100, tested=32)
    far = recall.DISTANCES.index(64)
    corrects, adds = (recall.recall(mixer, task)[far] for mixer in ("kda", "linear"))
    assert corrects > 0.9
    assert adds < corrects - 0.1


def test_recall_command(capsys):
    assert recall.main(["--mixer", "linear", "--steps", "2", "--device", "cpu"]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.endswith("192-255  256-383")
    assert line.startswith("linear ")


def _stop(*_):
    raise KeyboardInterrupt


def test_what_is_stopped_shows_what_was_done(capsys, monkeypatch):
    first = iter([[0.5] * len(recall.DISTANCES)])
    monkeypatch.setattr(recall, "recall", lambda *_: next(first, None) or _stop())
    assert recall.main(["--mixer", "kda", "linear", "--device", "cpu"]) == 130
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["right", "kda"]
    assert printed.err.endswith("stopped\n")

    first = iter([{"seconds": 1.0, "bytes": 1e6}])
    monkeypatch.setattr(cost, "measure_apart", lambda *_: next(first, None) or _stop())
    assert cost.main(["--device", "cpu", "--lengths", "64", "128"]) == 130
    _, line = capsys.readouterr().out.splitlines()
    assert line == "kda           1,000 ms, 1 MB"


# Cost and page


def test_costs_command(capsys, monkeypatch):
    monkeypatch.setattr(cost, "OPERATORS", {"linear": "chunk_linear_attn"})
    assert cost.main(["--device", "cpu", "--lengths", "64", "128"]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["time,", "memory", "64", "tokens", "128", "tokens"]
    assert line.count(" ms, ") == 2


def test_names_stand_apart():
    placed = apart([10, 100, 12, 11, 300])
    assert placed[0] < placed[3] < placed[2] < placed[1] < placed[4]
    order = sorted(placed)
    assert min(b - a for a, b in itertools.pairwise(order)) >= LABEL - 0.2
    assert placed[4] == 300


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with Progress("kda", 4) as bar:
        for step in range(4):
            bar.update(step + 1, "loss 1.0")
    assert capsys.readouterr().err == "kda 4/4  loss 1.0  0:00 left\n"


def test_progress_is_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    with Progress("kda", 4) as bar:
        bar.update(4, "loss 1.0")
    drawn = capsys.readouterr().err
    assert "\n" not in drawn
    assert max(len(line.removesuffix("\x1b[K")) for line in drawn.split("\r")) < 40


def results() -> Results:
    nothing = float("nan")
    costs = [{"seconds": 0.001 * T, "bytes": 1e3 * T} for T in (64, 128)]
    killed = dict.fromkeys(costs[0], math.nan)
    return Results(
        machine={"date": "today", "where": "<here>"},
        seconds=100,
        training=Training([3.0, 2.0, 1.0], [(1, 2.5), (3, 1.0)], 1.5, 1000, 64, 10),
        sample="k=7 k?7 k?8",
        given=1,
        right=0.99,
        difference=(1e-6, 10.0),
        decoding=[0.001] * 250,
        task=Task(),
        recall={mixer: [0.5] * 7 + [nothing] for mixer in MIXERS},
        lengths=(64, 128),
        costs={name: costs for name in cost.OPERATORS} | {"fox": [costs[0], killed]},
    )


def test_the_page_is_whole():
    text = page(results())
    assert text.count("<svg") == 5
    for part in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
    assert "&lt;here&gt;" in text
    assert '<span class="wrong">k?8</span>' in text
    assert "nan" not in text
    for outside in ("http", "src=", "url(", "<script", "@import"):
        assert outside not in text


def test_the_demo(tmp_path, capsys):
    sizes = demo.Sizes(
        run=Run(steps=2, tokens=128, context=128, evaluations=1),
        task=dataclasses.replace(Task(), steps=2, length=80, tested=2),
        decoded=5,
        lengths=(64, 128),
    )
    out = Path(tmp_path) / "demo" / "page.html"
    assert demo.demo(out, "cpu", sizes) == 0
    assert "</html>" in out.read_text()
    assert generate.main([str(out.with_name("kda.pt")), "--length", "5", "--device", "cpu"]) == 0
    assert "largest difference of logits" in capsys.readouterr().out
