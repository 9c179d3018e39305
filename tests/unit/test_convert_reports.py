"""Conversion as an outsider sees it: long ways round, what reports say, and what the command answers to."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from chiar_megatron.checkpoint.torch_dist import read_metadata
from chiar_megatron.cli import main
from chiar_megatron.conversion.convert import convert, inspect
from chiar_megatron.conversion.formats import ConvertOptions, MegatronOptions, ReferenceOptions
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError
from chiar_megatron.inference.load import load_model
from tests.unit.reference_files import FIXTURES, REPOSITORY, random_file
from tests.unit.tiny_models import save_model, tiny_config, tiny_model, tiny_tokenizer

PLAIN = ConvertOptions()


@pytest.mark.parametrize("name", ["chiar_tiny", "chiar_soft_tiny", "chiar_hard_tiny", "odd"])
def test_the_long_way_round_changes_no_bit(tmp_path, name):
    """reference, native, mp_rank files, native, transformers, native, torch_dist, native, reference."""
    source, cut = FIXTURES / f"{name}.pt", MegatronOptions("torch", 2, 2)
    if (
        name == "odd"
    ):  # one head, 51 rows, a head of its own, seven layers: no cut by tensors, none into equal stages
        head = torch.randn(51, 34, generator=torch.Generator().manual_seed(1))
        source = random_file(tmp_path / "odd.pt", 34, 1, "DRRARDA", "hard", head=head, vocab=51)
        cut = MegatronOptions("torch", 1, 7)
    way = [
        ("native", PLAIN), ("megatron", ConvertOptions(megatron=cut)), ("native", PLAIN),
        ("huggingface", ConvertOptions(shard_bytes=20_000)), ("native", PLAIN), ("megatron", PLAIN),
        ("native", PLAIN), ("reference", PLAIN),
    ]  # fmt: skip
    here, kind = source, "reference"
    for number, (target, options) in enumerate(way):
        there = tmp_path / f"{number}.{target}"
        report = convert(kind, target, here, there, options)
        assert report["verification"]["logits"] < 1e-4
        here, kind = there, target
    before, after = (torch.load(path, weights_only=True) for path in (source, here))
    assert before["step"] == after["step"]
    states = [{k: v for k, v in side["model"].items() if "rope" not in k} for side in (before, after)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A model in every format."""
    root = tmp_path_factory.mktemp("formats")
    found = {"reference": root / "a.pt", "native": root / "native"}
    random_file(found["reference"], 32, 2, "DRA", vocab=400)
    convert("reference", "native", found["reference"], found["native"], PLAIN)
    older = ConvertOptions(megatron=MegatronOptions("torch"))
    for name, target, options in (
        ("huggingface", "huggingface", PLAIN), ("torch_dist", "megatron", PLAIN),
        ("mp_rank", "megatron", older), ("deepspeed", "deepspeed", PLAIN),
    ):  # fmt: skip
        found[name] = root / name
        convert("native", target, found["native"], found[name], options)
    return found


def numbers_of(path: Path) -> list[tuple[Path, int, int]]:
    """Where the numbers of a checkpoint's tensors lie: file, first byte, bytes."""
    places = []
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file.name == ".metadata":
            stored = read_metadata(file.parent).storage_data.values()
            places += [(file.parent / place.relative_path, place.offset, place.length) for place in stored]
        elif file.suffix == ".safetensors":
            first = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            places.append((file, first, file.stat().st_size - first))
        elif file.suffix == ".pt" and file.name != "common.pt":
            reader = torch._C.PyTorchFileReader(str(file))
            for name in reader.get_all_records():
                # Of the authors', the frequencies of rotary positions (8 of them) are looked at.
                if name.startswith("data/") and (file != path or len(reader.get_record(name)) != 32):
                    places.append((file, reader.get_record_offset(name), len(reader.get_record(name))))
    return places


@pytest.mark.parametrize("kind", ["reference", "native", "huggingface", "torch_dist", "mp_rank", "deepspeed"])
def test_inspect_needs_no_number_but_every_size(checkpoints, tmp_path, kind):
    source, copy = checkpoints[kind], tmp_path / checkpoints[kind].name
    subprocess.run(["cp", "-r", source, copy], check=True)
    wanted = inspect(source, PLAIN)
    places = numbers_of(copy)
    assert sum(length for _, _, length in places) > 0.99 * wanted["bytes"]  # the authors' have fewer buffers
    for file, first, length in places:
        with file.open("r+b") as stream:
            stream.seek(first)
            stream.write(b"\xff" * length)  # no number at all
    found = inspect(copy, PLAIN)
    assert {**found, "path": ""} == {**wanted, "path": ""}
    target = "huggingface" if kind == "native" else "native"
    with pytest.raises(ChiarError):
        convert(found["format"], target, copy, tmp_path / "no", PLAIN)
    # A file that ends early is seen all the same.
    file = max(places, key=lambda place: place[2])[0]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError) as caught:
        inspect(copy, PLAIN, found["format"])
    assert file.name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_megatrons_arguments_tell(checkpoints, tmp_path):
    folder = tmp_path / "args"
    subprocess.run(["cp", "-r", checkpoints["torch_dist"], folder], check=True)
    path = folder / "iter_0000009/common.pt"
    content = torch.load(path, weights_only=False)
    content["args"].consumed_train_samples, content["args"].tensor_model_parallel_size = 10, 4
    torch.save(content, path)
    found = inspect(folder, PLAIN)
    assert found["tokens_seen"] == 2560  # of 256 tokens each
    assert found["layout"] == {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}


def test_reports_say_where_the_tokenizer_stayed(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    gone = {"tokenizer": str(tmp_path / "gone.model"), "eod_token": 1}
    save_model(tiny_model(tiny_config(vocab_size=320, data=gone)), tmp_path / "native")

    def notes(source_format: str, target_format: str, source: str, target: str, **options) -> str:
        said: list[str] = []
        places = (tmp_path / source, tmp_path / target)
        report = convert(source_format, target_format, *places, ConvertOptions(**options), said.append)
        written = json.loads((tmp_path / target / "conversion.json").read_text())
        assert said == report["notes"] == written["notes"]
        return " ".join(said)

    missing = f"its tokenizer {gone['tokenizer']} is not there and is left out (--tokenizer)"
    assert missing in notes("native", "huggingface", "native", "without")
    assert missing in inspect(tmp_path / "native", PLAIN)["notes"]
    assert not (tmp_path / "without/tokenizer.json").exists()
    # A folder without one needs no note; one that we cannot read does, unless another is given.
    assert "tokenizer" not in notes("huggingface", "native", "without", "a")
    (tmp_path / "without/tokenizer.json").write_text("{}")
    assert "its tokenizer.json is left out (--tokenizer): " in notes("huggingface", "native", "without", "b")
    assert load_model(tmp_path / "b", device="cpu").config.data.tokenizer is None
    given = str(tokenizer)
    said = notes("native", "huggingface", "native", "with", tokenizer=given)
    assert (tmp_path / "with/tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert "left out (--tokenizer)" not in said
    assert "the tokenizer are not carried" in notes("native", "megatron", "native", "m", tokenizer=given)


def test_options_and_places_that_make_no_sense(checkpoints, tmp_path, capsys):
    source = checkpoints["native"]

    def refused(*arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        return message

    to_hf = ("--from", "native", "--to", "huggingface", source, tmp_path / "no")
    for option, value, where in (
        ("--num-heads", 2, "--from reference"), ("--tau-low", 0.5, "--from reference"),
        ("--routing-mode", "soft", "--from reference"), ("--config", "c.json", "--from deepspeed"),
        ("--schedule", "R*3", "--from huggingface"), ("--checkpoint-format", "torch", "--to megatron"),
    ):  # fmt: skip
        message = refused(*to_hf, option, value)
        assert option in message and f"is for {where} alone" in message
    assert "is for --from deepspeed alone" in refused("--inspect", source, "--config", "c.json")
    assert "neither --to nor a second path" in refused("--inspect", source, *to_hf[2:])
    to_megatron = ("--from", "native", "--to", "megatron", source, tmp_path / "no")
    assert "--checkpoint-format torch alone" in refused(*to_megatron, "--tensor-parallel", 2)
    for inside in (source, source / "hf", source / "step_00000009" / "hf"):
        assert "exists already" in (message := refused(*to_hf[:-1], inside)) or "lies within" in message
    assert sorted(p.name for p in source.iterdir()) == [
        "config.yaml",
        "conversion.json",
        "latest",
        "step_00000009",
    ]
    odd = random_file(tmp_path / "odd.pt", 90, 6, "DRA")
    assert "15 is odd" in refused(
        "--from", "reference", "--to", "native", "--num-heads", 6, odd, tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="--tau-high is for"):
        convert(
            "native", "huggingface", source, tmp_path / "no", ConvertOptions(ReferenceOptions(tau_high=1.0))
        )


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("native", "huggingface", "config.json"), ("native", "megatron", "latest_checkpointed_iteration.txt"),
        ("native", "deepspeed", "latest"), ("huggingface", "native", "config.yaml"),
    ],
)  # fmt: skip
def test_a_folder_may_bear_the_name_of_a_file_in_it(checkpoints, tmp_path, kind, target, name):
    convert(kind, target, checkpoints[kind], tmp_path / name, PLAIN)
    assert (tmp_path / name / name).is_file() and (tmp_path / name / "conversion.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert inspect(tmp_path / name, PLAIN)["format"] == target


def test_a_report_beside_a_file_is_not_overwritten(checkpoints, tmp_path):
    report = tmp_path / "a.pt.conversion.json"
    report.write_text("of another file")
    with pytest.raises(CheckpointError, match="a.pt.conversion.json exists already"):
        convert("native", "reference", checkpoints["native"], tmp_path / "a.pt", PLAIN)
    assert report.read_text() == "of another file" and [*tmp_path.iterdir()] == [report]


def test_ctrl_c_says_one_line_and_the_same_command_goes_on(tmp_path):
    save_model(
        tiny_model(tiny_config(hidden_size=256, vocab_size=9000, schedule="A R*3 D")), tmp_path / "native"
    )
    content = tmp_path / ".hf.converting" / "content"
    command = [
        sys.executable,
        "-m",
        "chiar_megatron.cli",
        "convert",
        "--from",
        "native",
        "--to",
        "huggingface",
    ]
    command += ["--shard-bytes", "1MB", str(tmp_path / "native"), str(tmp_path / "hf")]
    begun = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A suite in a shell's background ignores the signal, and would hand that down.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 120
    while len(list(content.glob("*.safetensors"))) < 2 and begun.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    begun.send_signal(signal.SIGINT)
    said = begun.communicate(timeout=60)[1]
    assert begun.returncode == 75 and not (tmp_path / "hf").exists(), said
    assert said.splitlines() == ["chiar: interrupted; the same command takes up what is finished"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "hf/conversion.json").read_text())["notes"]
    assert any("taken from a conversion that was interrupted" in note for note in notes)
