"""Tables lose nothing: not on a narrow screen, where they come in parts, and not in a pipe, which pads no line."""

import itertools

import pytest
from rich.console import Console

from lora_kernels.console import SplitTable, on_stdout

HEADINGS = ("layer", "forward ms", "backward ms", "saved beside PEFT")
ROWS = (("lora_kernels [torch]", "12.345 ±10%", "23.456 ±20%", "0.125"), ("PEFT", "1.0 ±1%", "2.0 ±2%", "1.000"))


def table(**look):
    made = SplitTable(title="both", **look)
    for i, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if i else "left", no_wrap=i < 3)
    for row in ROWS:
        made.add_row(*(cell.replace("[", r"\[") for cell in row))
    return made


def lines_of(renderable, width):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize(("width", "parts"), [(80, 1), (60, 1), (46, 2), (38, 3)])
@pytest.mark.parametrize("edge", [True, False])
def test_every_part_names_its_rows_and_no_number_is_cut(width, parts, edge):
    lines = lines_of(table(show_edge=edge), width)
    for row in ROWS:
        shown = [line for line in lines if line.strip().startswith(row[0])]
        assert len(shown) == parts
        assert all(cell in " ".join(shown) for cell in row)
    heads = [i for i, line in enumerate(lines) if "layer" in line]
    assert len(heads) == parts
    assert lines.count("both") == 1
    assert all("" in lines[i - 3 : i] for i in heads[1:])  # between one part and the next


def test_headings_wrap_between_words_and_only_where_they_must():
    heads = {width: " ".join(" ".join(lines_of(table(), width)).split()) for width in (90, 60)}
    assert "saved beside PEFT" in heads[90]
    assert {"saved", "beside", "PEFT"} <= set(heads[60].split())


def test_the_names_of_rows_give_way_to_a_number():
    lines = lines_of(table(), 26)
    for number in itertools.chain.from_iterable(row[1:] for row in ROWS):
        assert any(number in line for line in lines)


def test_a_pipe_gets_whole_tables_without_blanks_at_the_end(capsys):
    on_stdout().print(table(), "what follows", style="bold")
    on_stdout().print("no end ", end="")
    shown = capsys.readouterr().out
    assert shown.count("layer") == 1
    assert [line for line in shown.splitlines()[:-1] if line != line.rstrip()] == []
    assert shown.endswith("what follows\nno end ")
