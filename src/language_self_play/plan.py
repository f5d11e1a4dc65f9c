"""`--dry-run`: what a run will do and take, computed from its configuration. Loads no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from language_self_play.config import Config

if TYPE_CHECKING:
    from rich.table import Table

    from language_self_play.data import Question
    from language_self_play.evaluate.contest import Contest
    from language_self_play.evaluate.exam import Exam
    from language_self_play.memory import MemoryEstimate, Turn

BYTES_PER_GIB = 2**30
# Of a data set, only the longest texts are tokenized to find its longest prompt.
LONGEST_TEXTS = 100


def print_plan(config: Config) -> None:
    """Print the batch arithmetic of a step and a memory estimate by part.

    Raises what a run would raise before it loads weights.
    """
    from rich.console import Console
    from rich.table import Table

    from language_self_play.memory import memory_estimate

    console = Console()
    found = checked(config)
    turns = longest_turns(config, found.questions)
    estimate = memory_estimate(
        config, list(turns.values()), judge_turn(config), found.evaluated, found.compared
    )
    table = Table(title="One step", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in batch_arithmetic(config, turns, estimate.shared_prompt).items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    console.print(_memory_table(estimate))
    if not estimate.shared_prompt:
        console.print(
            "This model has a kind of attention that knows no shared prompts: a prompt is computed, and in"
            " sampling kept, once for each of its completions."
        )
    for sentence in found.costs:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print("No weights were loaded. Run it without --dry-run to play.")


def _memory_table(estimate: MemoryEstimate) -> Table:
    from rich.table import Table

    table = Table(title=f"Memory of {estimate.device}, at most", title_justify="left")
    table.add_column("when")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for when, parts in {"always": estimate.always, **estimate.phases}.items():
        for name, size in parts.items():
            if size:
                table.add_row(when, name, f"{size / BYTES_PER_GIB:.3f}")
        table.add_section()
    peak = f"{estimate.peak / BYTES_PER_GIB:.3f}"
    table.add_row("peak", "always, and the largest of the others", peak, style="bold")
    for name, size in estimate.elsewhere.items():
        table.add_row("elsewhere", name, f"{size / BYTES_PER_GIB:.3f}")
    return table


class Checked(NamedTuple):
    """What a run has besides its game."""

    questions: list[Question]  # GRPO's
    evaluated: list[Turn]  # the answers of each evaluation
    compared: dict[str, Turn]  # what judges of pairs with weights here are asked, by set
    costs: list[str]  # a sentence for each evaluation that costs something


def checked(config: Config) -> Checked:
    """Raises what a run would raise before it loads weights."""
    from language_self_play.chat import load_chat
    from language_self_play.evaluate.pair_judges import local_judge_config
    from language_self_play.game import check_without_weights
    from language_self_play.memory import Turn
    from language_self_play.pretrained import context_length, load_model_config

    _, reward, questions, measures = check_without_weights(config)
    reward.close()
    measures.close()
    chat = load_chat(config.policy)
    context = context_length(load_model_config(config.policy.path, config.policy.trust_remote_code))

    def turn(part: Exam | Contest, num_answers: int) -> Turn:
        prompts = part.prompts(chat, context, config.solver.system_prompt)
        longest = max(map(len, prompts))
        most = min(part.section.max_tokens, context - longest)
        return Turn(len(prompts), longest, num_answers, most)

    evaluated = [turn(exam, exam.section.num_answers) for exam in measures.exams]
    compared = {}
    for contest in measures.contests:
        answered = turn(contest, 1)
        evaluated.append(answered)
        judge, pairs = contest.section.judge, 2 * answered.groups  # with the baseline's answers
        if judge.get("kind") == "reward_model":
            compared[contest.name] = answered._replace(groups=pairs)
        elif judge.get("kind") == "local":
            said = answered.P + answered.T
            compared[contest.name] = asked_of_judge(local_judge_config(judge), pairs, said)
    return Checked(questions, evaluated, compared, measures.plan())


def longest_turns(config: Config, questions: list[Question] | None = None) -> dict[str, Turn]:
    """The longest turn that each role can play; GRPO's `questions` are read where they are not given.

    Raises what a run would raise before it loads weights.
    """
    from language_self_play.chat import load_chat
    from language_self_play.game import challenger_prompts
    from language_self_play.memory import Turn

    if questions is None:
        questions = checked(config).questions
    chat = load_chat(config.policy)
    N, G = config.challenger.num_queries, config.solver.group_size
    if config.algorithm == "grpo":
        texts = sorted((q.query for q in questions), key=len)[-LONGEST_TEXTS:]
        prompt = max(len(chat.encode(text, config.solver.system_prompt)) for text in texts)
        return {"solver": Turn(N, prompt, G, config.solver.max_tokens)}
    prompt = max(len(chat.encode(p.text)) for p in challenger_prompts(config))
    query = len(chat.encode("", config.solver.system_prompt)) + config.challenger.max_tokens
    return {
        "challenger": Turn(1, prompt, N, config.challenger.max_tokens),
        "solver": Turn(N, query, G, config.solver.max_tokens),
    }


def judge_turn(config: Config) -> Turn | None:
    """What the reference is asked as judge, once for each answer; None in other algorithms."""
    if config.algorithm != "lsp":
        return None
    pairs = config.challenger.num_queries * config.solver.group_size
    return asked_of_judge(config, pairs, config.challenger.max_tokens + config.solver.max_tokens)


def asked_of_judge(config: Config, pairs: int, said: int) -> Turn:
    """What [self_reward] asks of `config`'s policy about `pairs` of a query and an answer, `said` tokens each.

    A prompt is counted from where those of a step begin to differ, in the mode that shares their common
    beginning.
    """
    from language_self_play.chat import load_chat
    from language_self_play.memory import Turn
    from language_self_play.pretrained import context_length, load_model_config
    from language_self_play.rewards.self_reward import JudgeQuestions

    chat, section = load_chat(config.policy), config.self_reward
    model_config = load_model_config(config.policy.path, config.policy.trust_remote_code)
    context = context_length(model_config)
    questions = JudgeQuestions(section, chat, context)
    if section.mode == "criteria":
        empty = questions.criterion_prompts([("", "")])
        return Turn(pairs * len(empty), min(max(map(len, empty)) + said, context), 1, 1)
    longest = len(questions.prompts([("", "")])[0]) + said
    if section.mode == "expected":
        return Turn(pairs, min(longest, context), 1, 1)
    one, other = questions.prompts([("1", "1"), ("2", "2")])
    alike = [a == b for a, b in zip(one, other, strict=True)]
    common = alike.index(False) if False in alike else 0
    return Turn(pairs, min(longest, context) - common, 1, section.max_tokens)


def batch_arithmetic(
    config: Config, turns: dict[str, Turn], shared_prompt: bool = True
) -> dict[str, int]:
    """Sequences, and at most how many tokens and micro-batches, of one step; the number of steps."""
    N, G = config.challenger.num_queries, config.solver.group_size
    plan = {"queries (N)": N, "answers (N x G)": N * G}
    if "challenger" in turns:
        plan["challenger prompt, tokens"] = turns["challenger"].P
    learned = [_learned(config, turn, shared_prompt) for turn in turns.values()]
    plan["tokens learned from, at most"] = sum(tokens for tokens, _ in learned)
    plan["micro-batches, at most"] = sum(batches for _, batches in learned)
    plan["optimizer steps of the run"] = config.steps
    return plan


def _learned(config: Config, turn: Turn, shared_prompt: bool) -> tuple[int, int]:
    """(tokens, micro-batches) of a turn that is as long as it may be; see packing.py."""
    from language_self_play.memory import largest_micro_batch

    B, K = largest_micro_batch(turn, config, shared_prompt)
    slices = turn.groups * -(-turn.K // K)
    prompts = slices if shared_prompt else turn.groups * turn.K
    return prompts * turn.P + turn.groups * turn.K * turn.T, -(-slices // B)
