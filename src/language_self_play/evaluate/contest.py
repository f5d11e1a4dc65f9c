"""Win rates of a run: a judge compares the policy's answers with step 0's, or with those of a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from language_self_play.chat import Chat
from language_self_play.config import GREEDY, WinRateSet
from language_self_play.config_evaluation import ALPACA_EVAL, STEP_0
from language_self_play.errors import LspError, RunFolderError
from language_self_play.evaluate.exam import chosen, fitting_prompts
from language_self_play.evaluate.outcomes import Evaluation, Record
from language_self_play.evaluate.outputs import (
    Annotation,
    Output,
    hub_baseline,
    in_order,
    read_instructions,
    read_outputs,
)
from language_self_play.evaluate.pair_judges import annotate, build_pair_judge
from language_self_play.evaluate.pair_report import win_rate_metrics
from language_self_play.run_folder import RunFolder
from language_self_play.sampling import Sampler
from language_self_play.types import Completion, Group


class Contest:
    """A set of prompts, a baseline's answers to them, and a judge."""

    def __init__(self, name: str, section: WinRateSet, device: str):
        """Read the prompts and the baseline's file, and check the judge; no weights are loaded.

        Raises InputFileError, ConfigError, ModelError or RewardError that names eval.win_rate.NAME.
        """
        self.name, self.section = name, section
        self.setting = f"eval.win_rate.{name}"
        everything = read_instructions(_file(section.path), f"{self.setting}.path =")
        self.prompted = chosen(everything, section.limit)
        self.baseline: list[str] | None = None
        if section.baseline != STEP_0:
            file = _file(section.baseline)
            answers = in_order(file, read_outputs(file, f"{self.setting}.baseline ="), everything)
            self.baseline = [a.output for a in chosen(answers, section.limit)]
        self.judge = build_pair_judge(section.judge, device, f"{self.setting}.judge")
        if doubt := self.judge.doubt([p.instruction for p in self.prompted]):
            warnings.warn(doubt, stacklevel=2)

    def load(self) -> None:
        """Load the judge's weights, if it has some here: what is wrong with them shows before step 0."""
        self.judge.load()

    def close(self) -> None:
        self.judge.close()

    def prompts(
        self, chat: Chat, context_length: int, system_prompt: str | None = None
    ) -> list[list[int]]:
        """The tokens of every prompt. Raises ConfigError for one that leaves no room to answer."""
        texts = [p.instruction for p in self.prompted]

        def named(place: int) -> str:
            return f"{self.setting}: the prompt {texts[place][:60]!r}"

        return fitting_prompts(texts, named, chat, context_length, system_prompt)

    def draw(self, sampler: Sampler, prompts: Sequence[list[int]]) -> list[Group]:
        """One answer to each of `prompts`."""
        section = self.section
        sampling = section if section.temperature else GREEDY
        return sampler.sample(list(prompts), 1, "evaluation", sampling, section.max_tokens)

    def compare(self, groups: Sequence[Group], step: int, run: RunFolder) -> Evaluation:
        """The answers of `groups`, version `step`'s, against the baseline's.

        An evaluation is not worth a run: where there is no judging them, for now or at all, that is told
        in a warning and in `trouble`, and the answers are recorded without verdicts.
        """
        answers = [group.completions[0] for group in groups]
        if step == 0 and self.section.baseline == STEP_0:
            self.baseline = [answer.text for answer in answers]
        before = dict(self.judge.spent)
        annotated: dict[str, Annotation] = {}
        trouble = []
        try:
            self.baseline = baseline = self.baseline or self._of_step_0(run)
            annotated = {a.instruction: a for a in self._judged(answers, baseline)}
        except LspError as error:
            trouble.append(f"{self.setting} has no win rate at step {step}: {error}")
            warnings.warn(
                f"{trouble[0]}; the run goes on, and evaluations/step-{step:06d}.jsonl has the answers",
                stacklevel=2,
            )
        questions = [
            self._record(i, answer, annotated.get(self.prompted[i].instruction))
            for i, answer in enumerate(answers)
        ]
        metrics = win_rate_metrics(self.name, questions)
        for what, value in self.judge.spent.items():
            metrics[f"time/eval_{self.name}_{what}"] = value - before.get(what, 0.0)
        return Evaluation(metrics, questions, trouble)

    def _of_step_0(self, run: RunFolder) -> list[str]:
        """Step 0's answers, which the run has kept. Raises RunFolderError without one of them."""
        kept = {q["id"]: q["answer"] for q in run.evaluation(0) if q.get("set") == self.name}
        missing = sum(p.instruction not in kept for p in self.prompted)
        if missing:
            raise RunFolderError(
                f"{run.evaluations_folder}/step-000000.jsonl: lacks step 0's answers to {missing} of the"
                f" {len(self.prompted)} prompts; put it back, and the prompts of {self.section.path}"
            )
        return [kept[p.instruction] for p in self.prompted]

    def _judged(self, answers: Sequence[Completion], baseline: Sequence[str]) -> list[Annotation]:
        ours = [
            Output(p.instruction, answer.text, "policy", p.dataset)
            for p, answer in zip(self.prompted, answers, strict=True)
        ]
        theirs = [
            Output(p.instruction, text, self.section.baseline)
            for p, text in zip(self.prompted, baseline, strict=True)
        ]
        return annotate(self.judge, theirs, ours, lambda done, of: None)

    def _record(self, place: int, answer: Completion, judged: Annotation | None) -> Record:
        """One prompt's record, as outcomes.py says."""
        prompt = self.prompted[place]
        record: Record = {"set": self.name, "id": prompt.instruction}
        if prompt.dataset is not None:
            record["dataset"] = prompt.dataset
        record |= {
            "answer": answer.text,
            "baseline": None if self.baseline is None else self.baseline[place],
            "tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
            "judge": self.judge.name,
            "preference": None if judged is None else judged.preference,
        }
        if self.judge.sees_order:
            record["baseline_first"] = None if judged is None else judged.baseline_first
            record["model_first"] = None if judged is None else judged.model_first
        return record

    def plan(self, times: int) -> str:
        """One sentence: what `times` evaluations take at most, of which step 0's own asks nothing."""
        section, judge = self.section, self.judge
        whose = section.baseline
        times -= whose == STEP_0
        most = judge.bound([p.instruction for p in self.prompted], section.max_tokens)
        often = "once" if times == 1 else f"{times} times"
        said = (
            f"{self.setting}: {len(self.prompted)} answers against {whose}, judged {often}."
            f" At most {most.requests:,} "
        )
        if not judge.sees_order:
            return f"{said}answers to be scored by {judge.name}, here, each time."
        price = (
            f"{times * most.usd:,.2f} USD"
            if most.usd
            else "of unknown price (judge.usd_per_million_input_tokens and …_output_tokens tell it)"
        )
        return (
            f"{said}requests to {judge.name} each time, {times * most.requests:,} in all, with"
            f" about {times * most.tokens_read:,.0f} tokens to read and {times * most.tokens_written:,} to"
            f" write, {price}; a reply without a score is asked for again, which is not counted."
        )


def _file(named: str) -> Path:
    return hub_baseline() if named == ALPACA_EVAL else Path(named)
