"""An answer is shown while it arrives, in a notebook and on a terminal."""

from __future__ import annotations

import io

import nbformat
from rich.console import Console

from dask_pcm.inference.questions.shown import _Terminal
from tests.inference.questions.conftest import PROMPT


def test_a_notebook_shows_the_answer_until_it_is_there(client, plain, execute, tmp_path):
    source = (
        "from distributed import Client; import dask_pcm as pcm\n"
        f"client = Client({client.scheduler.address!r})\n"
        "from IPython.display import DisplayHandle\n"
        "shown = []; update = DisplayHandle.update\n"
        "def note(self, content, **kw):\n"
        "    shown.append(content['text/plain']); return update(self, content, **kw)\n"
        "DisplayHandle.update = note\n"
        f"reply = pcm.LLM({plain.path!r}).ask({PROMPT!r}, max_tokens=1_000)\n"
        "texts = [one for one in shown if reply.text.startswith(one) and one]\n"
        "print('parts', len(texts) > 2, texts == sorted(texts, key=len), shown[-1] == '')\n"
        "reply"
    )
    cell = nbformat.v4.new_code_cell(source)
    outputs = execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    printed = "".join(one.text for one in outputs if one.output_type == "stream")
    assert "parts True True True" in printed
    displays = [one for one in outputs if one.output_type == "display_data"]
    assert [one.data["text/plain"] for one in displays] == [""]
    (result,) = [one for one in outputs if one.output_type == "execute_result"]
    assert len(result.data["text/markdown"]) > 500


def test_a_terminal_shows_the_end_of_the_text_and_erases_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=6)
    with _Terminal(console, shows_text=True) as shown:
        shown.show("", "loading 'm'")
        shown.show("\n".join(f"line {k}" for k in range(50)), "")
        said = console.file.getvalue()
        assert "loading 'm'" in said and "line 49" in said and "line 30" not in said
    assert console.file.getvalue().endswith("\x1b[2K")
