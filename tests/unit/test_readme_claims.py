"""Each sentence of README has tests that hold it, or says why it is no claim: a new sentence without an entry fails."""

from __future__ import annotations

import re

import pytest

from tests.support.documents import FENCE, ROOT

NO_CLAIM = "no claim: "
CAPTION = NO_CLAIM + "of a picture, which was looked at"
LINKS = NO_CLAIM + "links, which tests/unit/test_documents.py follows"
# How a sentence begins, and the tests that hold it, as FILE::NAME below `tests`.
CLAIMS = {
    "Watch a vision transformer's attention form": NO_CLAIM + "the title",
    "One callback for PyTorch Lightning: every few hundred steps": """
        integration/test_callback.py::test_no_arguments_watch_student_and_teacher
        integration/test_callback.py::test_maps_are_what_the_model_computes
        unit/test_schedule.py::test_fifty_over_a_run_and_ten_over_a_short_one
        integration/test_health.py::test_a_flag_in_a_run_is_told_everywhere
        integration/test_show.py::test_masks_and_maps_are_those_of_dino
        integration/test_loggers.py::test_wandb integration/test_loggers.py::test_mlflow_server
        integration/test_tracker_clients.py::test_comet integration/test_tracker_clients.py::test_aim""",
    "That is all: it finds the backbones": """
        integration/test_callback.py::test_no_arguments_watch_student_and_teacher
        integration/test_adoption.py::test_evenly_spaced_images_of_the_validation_data
        unit/test_normalisation.py
        unit/test_schedule.py::test_fifty_over_a_run_and_ten_over_a_short_one
        integration/test_reports.py::test_what_was_found_is_three_lines_and_in_the_dashboard
        integration/test_reports.py::test_the_last_line_names_the_report
        browser/test_player.py::test_one_slider_moves_everything""",
    "`AttentionMapCallback(": "integration/test_callback.py::test_probe_folder_missing_empty_or_broken",
    "The player: student and teacher": CAPTION,
    "True.": NO_CLAIM + "a heading",
    "A map is what the model computed": """
        integration/test_callback.py::test_maps_are_what_the_model_computes
        integration/test_capture.py::test_one_layer_with_all_its_facts
        integration/test_show.py::test_matrices_against_float64_and_values
        hostile/test_conditions.py::test_flex_attention_whose_scores_are_modified_is_refused""",
    "Fused kernels, RoPE, registers": """
        integration/test_backbones_of_libraries.py::test_every_layer_over_all_patches_is_right
        hostile/test_conditions.py::test_sdpa_backends hostile/test_conditions.py::test_autocast
        hostile/test_conditions.py::test_compiled_model_is_read_and_not_traced_again
        faults/test_isolation.py::test_nothing_changes""",
    "How it works, models, kernels": LINKS,
    "Harmless.": NO_CLAIM + "a heading",
    "Training ends in bit-identical weights": """
        faults/test_harmless.py::test_bit_identical
        faults/test_harmless.py::test_the_comparison_can_fail
        integration/test_callback.py::test_failure_in_mid_training_is_one_warning""",
    "What is promised": LINKS,
    "Cheap.": NO_CLAIM + "a heading",
    "Capturing the last layer of": """
        integration/test_benchmarks.py::test_a_quick_run_writes_the_document
        integration/test_capture.py::test_the_forward_is_left_after_the_last_wanted_layer""",
    "Memory for attention is": """
        integration/test_capture.py::test_memory_is_linear_in_tokens
        faults/test_job_queue.py::test_putting_never_waits_and_drops_the_oldest_pictures""",
    "Benchmarks, beside five peers": LINKS,
    "Is the run healthy?": NO_CLAIM + "a question",
    "Rank and spread of global features": """
        integration/test_training_features.py::test_values_are_those_of_trainings_own_forwards
        unit/test_verdict.py::test_each_finding unit/test_verdict.py::test_a_run_that_goes_well""",
    "One image over": CAPTION,
    "Hugging Face's `Trainer` has": """
        integration/test_watch.py::test_hugging_face_trainer_without_an_argument_and_resumed
        integration/test_environment.py::test_lightly_train""",
    "Recipes are whole programs": """
        integration/test_recipes.py::test_recipe integration/test_recipes.py::test_solo_learn
        integration/test_recipes.py::test_main_dino_goes_on_from_its_checkpoint
        integration/test_recipes.py::test_lightning_cli integration/test_recipes.py::test_slurm""",
    "Under DDP and FSDP": """
        integration/test_distributed.py::test_the_whole_is_what_one_process_sees
        integration/test_sharded.py::test_the_whole_is_that_of_an_unsharded_model""",
    "Commands do the same from a shell": """
        integration/test_cli.py::test_a_command_is_a_module_whose_docstring_is_its_help
        unit/test_readme_claims.py::test_all_commands_are_named""",
    "Start here ·": LINKS,
}


def sentences() -> list[str]:
    """README's text without code, links as their words."""
    text = FENCE.sub("\n\n", (ROOT / "README.md").read_text())
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text.replace("**", ""))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=- )", text)]
    found = [re.split(r"(?<=[.?])\s+(?=[A-Z`])", part.removeprefix("- ")) for part in paragraphs if part]
    return [sentence for part in found for sentence in part]


def test_each_sentence_has_an_entry_and_each_entry_a_sentence() -> None:
    found = sentences()
    assert [s for s in found if sum(s.startswith(start) for start in CLAIMS) != 1] == []
    assert [start for start in CLAIMS if sum(s.startswith(start) for s in found) != 1] == []


@pytest.mark.parametrize("start", [start for start, held in CLAIMS.items() if not held.startswith(NO_CLAIM)])
def test_the_tests_are_there(start: str) -> None:
    for test in CLAIMS[start].split():
        file, _, name = test.partition("::")
        assert not name or re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.M), test
        assert (ROOT / "tests" / file).is_file()


def test_all_commands_are_named() -> None:
    from attn_monitor.commands.cli import COMMANDS

    (sentence,) = (s for s in sentences() if s.startswith("Commands do"))
    assert set(re.findall(r"`(?:attn-monitor )?(\w+)`", sentence)) == set(COMMANDS)
