"""Pretrain the arena's tiny model from scratch: one seed, one command, under 15 minutes on 2 cores.

    python -m language_self_play.arena.pretrain OUT_DIR

Three skills are learned at once (see tiny_model): solve, pose, judge. The answers it learns to
solve from are partly wrong, as those of people are; this is what leaves the model room to sharpen.
No held-out question, nor any human query of the GRPO file, depends on this script's randomness.

Found by trying, one run each: answers units first; Muon for the matrices, at a small learning rate; many
small steps, each a mixture of all tasks; and clean answers first, wrong ones only in the last part, when
the skills are there. docs/arena.md says what did not work.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from language_self_play.arena import questions, tiny_model
from language_self_play.arena.tasks import TASKS, TIERS, Unsolvable, parse

SEED = 0
NUM_THREADS = 2
REPORT_EVERY = 100
# The label of tokens without a loss; cross_entropy's own default.
IGNORED = -100
NUM_STEPS = 2_500
EXAMPLES_PER_STEP = 192
CHUNKS_PER_STEP = 3
WARMUP_STEPS = 50
DECAY_SHARE = 0.5
MATRIX_LR = 0.005
OTHER_LR = 3e-3

# Arithmetic is learned from clean answers first; the slips come with the last part.
CLEAN_SHARE = 0.6
CLEAN_WEIGHTS = {"solve": 0.75, "judge": 0.20, "pose": 0.05}
SKILL_WEIGHTS = {"solve": 0.50, "judge": 0.40, "pose": 0.10}
TIER_WEIGHTS = (0.20, 0.35, 0.45)
TASK_WEIGHTS = (2.0, 2.0, 2.0, 1.5, 0.75, 0.75)
WRONG_ANSWER_SHARE = 0.40
JUDGED_FLAWED_SHARE = 0.30


# ---------------------------------------------------------------- examples


def draw_example(rng: random.Random, progress: float) -> tuple[str, str]:
    """(user message, assistant message) of one skill."""
    weights = SKILL_WEIGHTS if progress >= CLEAN_SHARE else CLEAN_WEIGHTS
    skill = rng.choices(list(weights), list(weights.values()))[0]
    if skill == "pose":
        return tiny_model.POSE_PROMPT, questions.draw_human_query(rng)
    query = questions.draw_learnable_query(
        rng, rng.choices(TIERS, TIER_WEIGHTS)[0], rng.choices(TASKS, TASK_WEIGHTS)[0]
    )
    if skill == "solve":
        answer = parse(query).answer
        wrong = progress >= CLEAN_SHARE and rng.random() < WRONG_ANSWER_SHARE
        return query, spoil(rng, answer) if wrong else answer
    if rng.random() < JUDGED_FLAWED_SHARE:
        query = questions.draw_flawed_query(rng)
    answer = draw_judged_answer(rng, query)
    prompt = tiny_model.JUDGE_PROMPT.format(query=query, answer=answer)
    score = tiny_model.judge_score(query, answer)
    return prompt, tiny_model.SCORE_REPLY.format(score=score)


def draw_judged_answer(rng: random.Random, query: str) -> str:
    """An answer as a Solver might give it: right, nearly right, or of another query."""
    try:
        right = parse(query).answer
    except Unsolvable:
        right = "".join(c for c in query[-rng.randint(2, 6) :] if c.isalnum())[::-1] or "0"
    draw = rng.random()
    if draw < 0.45:
        return right
    if draw < 0.85:
        return spoil(rng, right)
    other = questions.draw_query(rng, rng.choice(TIERS))
    return parse(other).answer


def spoil(rng: random.Random, answer: str) -> str:
    """`answer` with a slip: one character wrong or missing, or two neighbours swapped."""
    place = rng.randrange(len(answer))
    draw = rng.random()
    if draw < 0.15 and len(answer) > 1:
        return answer[:place] + answer[place + 1 :]
    if draw < 0.30 and place + 1 < len(answer) and answer[place] != answer[place + 1]:
        return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
    alphabet = "0123456789" if answer.isdecimal() else "abcdefghijklmnopqrstuvwxyz"
    wrong = rng.choice(alphabet.replace(answer[place], ""))
    return answer[:place] + wrong + answer[place + 1 :]


def batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_steps: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each step EXAMPLES_PER_STEP examples, as (input ids, labels) of similar lengths."""
    encode = tokenizer.backend_tokenizer.encode_batch
    assistant = tokenizer.vocab[tiny_model.ASSISTANT]
    for step in range(num_steps):
        examples = [draw_example(rng, step / num_steps) for _ in range(EXAMPLES_PER_STEP)]
        texts = [
            f"{tiny_model.USER}{user}{tiny_model.ASSISTANT}{reply}{tiny_model.END}"
            for user, reply in examples
        ]
        rows = sorted((e.ids for e in encode(texts, add_special_tokens=False)), key=len)
        chunk = EXAMPLES_PER_STEP // CHUNKS_PER_STEP
        yield [
            make_batch(rows[i : i + chunk], assistant, tokenizer.pad_token_id)
            for i in range(0, EXAMPLES_PER_STEP, chunk)
        ]


def make_batch(
    rows: list[list[int]], assistant: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, labels), padded on the right; labels are IGNORED outside the assistant's reply."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    marks = tokens == assistant
    in_reply = (marks.cumsum(1) > 0) & ~marks & (tokens != pad)
    labels = tokens.masked_fill(~in_reply, IGNORED)
    return tokens[:, :-1], labels[:, 1:]


# ---------------------------------------------------------------- optimisation


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, in float32, matrices of one shape together.

    torch.optim.Muon orthogonalises one matrix at a time in bfloat16: 0.87 s a step for this model
    on a CPU without bfloat16 instructions, against 0.03 s here. Same coefficients.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradient = torch.stack([m.grad for m in matrices if m.grad is not None])
                state = self.state[matrices[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                direction = self._orthogonalise(gradient.lerp(momentum, group["momentum"]))
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for matrix, update in zip(matrices, direction, strict=True):
                    matrix.add_(update, alpha=-group["lr"] * scale)

    def _orthogonalise(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = self.COEFFICIENTS
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def lr_factor(step: int, num_steps: int) -> float:
    """Warm up, hold, then fall linearly to 0 over the last DECAY_SHARE of the steps."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (num_steps - step) / (DECAY_SHARE * num_steps))


def pretrain(
    num_steps: int = NUM_STEPS, seed: int = SEED
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """(model, tokenizer) after `num_steps` optimizer steps."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = tiny_model.build_tokenizer()
    model = LlamaForCausalLM(tiny_model.build_config(tokenizer))
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: dict[torch.optim.Optimizer, float] = {
        Muon(matrices, lr=MATRIX_LR): MATRIX_LR,
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0): OTHER_LR,
    }
    start = time.perf_counter()
    for step, chunks in enumerate(batches(rng, tokenizer, num_steps), 1):
        for optimizer, lr in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * lr_factor(step - 1, num_steps)
        loss = backward(model, chunks)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % REPORT_EVERY == 0 or step == num_steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{num_steps}  {seconds:4.0f} s  loss {loss:.3f}", flush=True)
    return model, tokenizer


def backward(model: LlamaForCausalLM, chunks: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Add the gradients of one step's mean cross-entropy over reply tokens; return its value."""
    num_labels = sum(int((labels != IGNORED).sum()) for _, labels in chunks)
    total = 0.0
    for tokens, labels in chunks:
        kept = labels != IGNORED
        hidden = model.model(input_ids=tokens).last_hidden_state
        logits = model.lm_head(hidden[kept])
        loss = cross_entropy(logits, labels[kept], reduction="sum") / num_labels
        loss.backward()
        total += loss.item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the arena's tiny model from scratch.")
    parser.add_argument("out", type=Path, help="the folder to write the model to")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    model, tokenizer = pretrain(options.steps)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out} written; measure it by: lsp eval accuracy {options.out}")


if __name__ == "__main__":
    main()
