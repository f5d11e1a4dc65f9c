"""Which model a name means, and how it is spoken to."""

from __future__ import annotations

import pytest

from language_self_play.config import Policy
from language_self_play.errors import ConfigError
from language_self_play.evaluate.subject import subject


@pytest.fixture
def run(make_config, tmp_path):
    """A run with its final model, a checkpoint, a chat template and a system prompt."""
    for folder in ("model", "checkpoints/step-000002/model"):
        (tmp_path / folder).mkdir(parents=True)
    policy = {"path": "arena", "chat_template_kwargs": {"thinks": False}}
    config = make_config(policy=policy, solver={"system_prompt": "Be brief."})
    (tmp_path / "config.toml").write_text(config.to_toml())
    return tmp_path


def test_a_run_means_its_newest_model_spoken_to_as_the_run_does(run):
    section, system_prompt = subject(str(run))
    assert section == Policy(path=str(run / "model"), chat_template_kwargs={"thinks": False})
    assert system_prompt == "Be brief."
    (run / "model").rmdir()
    section, _ = subject(str(run))
    assert section.path == str(run / "checkpoints" / "step-000002" / "model")


def test_a_folder_inside_a_run_is_itself_spoken_to_as_the_run_does(run):
    inside = str(run / "checkpoints" / "step-000002" / "model")
    section, system_prompt = subject(inside)
    assert (section.path, system_prompt) == (inside, "Be brief.")


def test_any_other_name_is_a_model_without_a_system_prompt():
    assert subject("owner/name") == (Policy(path="owner/name"), None)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused_by_what_it_was_given_for(name):
    with pytest.raises(ConfigError, match=r"^baseline is empty; name a folder"):
        subject(name, "baseline")
