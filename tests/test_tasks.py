"""Laws of tasks of lm-evaluation-harness: a model in memory is measured, also a sparse one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskpro_lightning.catalog import resolve

pytest.importorskip("lm_eval")
from maskpro_lightning.commands.tasks import on_tasks

TASK = """
task: two_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_memory_is_measured_on_a_task_of_ones_own(tmp_path: Path) -> None:
    questions = ("The value is an", "A list of", "The function returns", "Turned round:")
    answers = ("integer", "objects", "the", "the")
    rows = [
        {"question": question, "choices": [answer, "zqxj vkw"], "label": int("Turned" in question)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    file = tmp_path / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "two_words.yaml").write_text(TASK.format(file=file))
    model = AutoModelForCausalLM.from_pretrained(resolve("quickstart/model"))
    tokenizer = AutoTokenizer.from_pretrained(resolve("quickstart/model"))
    found = on_tasks(model, tokenizer, ["two_words"], folder=str(tmp_path))
    assert found == {"two_words acc": 0.75}
    found = on_tasks(model, tokenizer, ["two_words"], limit=3, folder=str(tmp_path))
    assert found == {"two_words acc": 1.0}


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lm_eval has no task 'arc_eazy': 'lm_eval ls tasks'"):
        on_tasks(None, None, ["arc_easy", "arc_eazy"])  # type: ignore[arg-type]


def test_without_lm_eval_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import maskpro_lightning.commands.tasks"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.stderr.strip() == "--tasks needs lm_eval: pip install 'maskpro-lightning[tasks]'"
