"""Arguments that `chiar` cannot take: one line, exit code 2."""

from __future__ import annotations

import pytest

from chiar_megatron.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrain recipe.yaml --foo 1", "chiar pretrain: unrecognized arguments: --foo 1; see"),
        ("--foo plan recipe.yaml", "chiar plan: unrecognized arguments: --foo; see `chiar plan --help`"),
        ("bench step --seq-length x", "chiar bench step: argument --seq-length: 'x' is no number; see"),
        ("convert --shard-bytes 5XB", "chiar convert: argument --shard-bytes: '5XB' is no number; see"),
        ("plan recipe.yaml --gpus 0", "chiar plan: argument --gpus: 0 must be at least 1; see"),
        ("plan recipe.yaml --gpus", "chiar plan: argument --gpus: expected one argument; see"),
        ("bench layer --time-limit nan", "chiar bench layer: argument --time-limit: nan must be at least 0"),
        ("bench balance --time-limit -1", "chiar bench balance: argument --time-limit: -1 must be"),
        ("nope", "chiar: argument VERB: invalid choice: 'nope'"),
        ("", "chiar: the following arguments are required: VERB; see `chiar --help`"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert printed.err.startswith(said) and printed.err.count("\n") == 1


def test_help_has_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--help"])
    assert exit_.value.code == 0 and "--gpus N" in capsys.readouterr().out
