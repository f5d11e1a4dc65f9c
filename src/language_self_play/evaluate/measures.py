"""What config.eval asks for, ready to be measured at the versions of the policy that are due."""

from __future__ import annotations

from language_self_play.chat import Chat
from language_self_play.config import Config
from language_self_play.evaluate.accuracy import arena_accuracy
from language_self_play.evaluate.contest import Contest
from language_self_play.evaluate.exam import Exam
from language_self_play.evaluate.harness import HarnessTasks
from language_self_play.evaluate.outcomes import ARENA, Evaluation, Record, set_metrics
from language_self_play.metrics import finite
from language_self_play.policy import Policy
from language_self_play.row_batches import RowBatches
from language_self_play.run_folder import RunFolder
from language_self_play.sampling import Sampler
from language_self_play.types import Group


class Measures:
    """The arena's questions, question sets, win rates and lm-eval's tasks of one run."""

    def __init__(self, config: Config, device: str):
        """Read and check all of it; no weights are loaded. Raises as Exam, Contest and HarnessTasks."""
        self.section = section = config.eval
        self.steps, self.system_prompt = config.steps, config.solver.system_prompt
        self.harness = None if section.harness is None else HarnessTasks(section.harness)
        self.exams = [Exam(name, one) for name, one in section.accuracy.items()]
        self.contests = [Contest(name, one, device) for name, one in section.win_rate.items()]

    def check_prompts(self, chat: Chat, context_length: int) -> None:
        """Raises ConfigError for a question that leaves no room to answer."""
        for part in self._sampled:
            part.prompts(chat, context_length, self.system_prompt)

    def load(self) -> None:
        """Load the weights of judges of pairs that have some here."""
        for contest in self.contests:
            contest.load()

    def close(self) -> None:
        for part in self._sampled:
            part.close()

    def is_due(self, step: int) -> bool:
        """Whether version `step` is to be measured in any way."""
        cadences = [self.section.every] if self.section.tasks or self.exams else []
        cadences += [self._every(contest) for contest in self.contests]
        cadences += [] if self.harness is None else [self._every(self.harness)]
        return any(self._now(step, every) for every in cadences)

    def draw(self, step: int, sampler: Sampler) -> dict[str, list[Group]]:
        """The answers that are to be checked or compared, by setting; all ranks draw their share."""
        return {
            part.setting: part.draw(
                sampler, part.prompts(sampler.chat, sampler.context_length, self.system_prompt)
            )
            for part in self._sampled
            if self._now(step, self._every(part))
        }

    def evaluation(
        self,
        step: int,
        drawn: dict[str, list[Group]],
        policy: Policy,
        batches: RowBatches,
        run: RunFolder,
    ) -> Evaluation:
        """What is due of version `step`, of which `drawn` are the answers. For the first rank alone."""
        metrics: Record = {}
        questions: list[Record] = []
        trouble: list[str] = []
        if ARENA in self.section.tasks and self._now(step, self.section.every):
            accuracy = arena_accuracy(policy.whole, policy.chat, batches, self.system_prompt)
            metrics |= accuracy.metrics()
            questions += accuracy.records()
        for exam in self.exams:
            if exam.setting in drawn:
                answered = exam.mark(drawn[exam.setting])
                metrics |= set_metrics(exam.name, answered, exam.section.pass_at)
                questions += answered
        for contest in self.contests:
            if contest.setting in drawn:
                found = contest.compare(drawn[contest.setting], step, run)
                metrics |= found.metrics
                questions += found.questions
                trouble += found.trouble
        if self.harness is not None and self._now(step, self._every(self.harness)):
            metrics |= self.harness.metrics(policy.whole, policy.chat, self.system_prompt)
        return Evaluation(finite(metrics), questions, trouble)

    def plan(self) -> list[str]:
        """A sentence for each part that costs more than the policy's own time."""
        lines = [c.plan(self._times(self._every(c))) for c in self.contests]
        if self.harness is not None:
            lines.append(self.harness.plan(self._times(self._every(self.harness))))
        return lines

    @property
    def _sampled(self) -> list[Exam | Contest]:
        return [*self.exams, *self.contests]

    def _every(self, part: Exam | Contest | HarnessTasks) -> int:
        own = None if isinstance(part, Exam) else part.section.every
        return own or self.section.every

    def _now(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps

    def _times(self, every: int) -> int:
        """How many versions are measured: 0, every so many, and the last."""
        return -(-self.steps // every) + 1
