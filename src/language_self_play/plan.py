"""`--dry-run`: what a run will do and take, computed from its configuration. Loads no weights."""

from __future__ import annotations

from language_self_play.config import Config

BYTES_PER_GIB = 2**30
FLOAT32_BYTES = 4


def print_plan(config: Config) -> None:
    """Print the batch arithmetic of a step and a memory estimate by part.

    Raises what a run would raise before it loads weights.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="One step", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in batch_arithmetic(config).items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    memory = Table(title="Memory, estimated", title_justify="left")
    memory.add_column("part")
    memory.add_column("GiB", justify="right")
    estimate = memory_estimate(config)
    for name, size in estimate.items():
        memory.add_row(name, f"{size / BYTES_PER_GIB:.3f}")
    memory.add_row("sum", f"{sum(estimate.values()) / BYTES_PER_GIB:.3f}", style="bold")
    console.print(memory)
    console.print("No weights were loaded. Run it without --dry-run to play.")


def batch_arithmetic(config: Config) -> dict[str, int]:
    """Sequences, and at most how many tokens and micro-batches, of one step; the number of steps.

    Raises what a run would raise before it loads weights.
    """
    from language_self_play.chat import load_chat
    from language_self_play.train import challenger_prompts, check_without_weights

    check_without_weights(config)
    chat = load_chat(config.policy)
    N, G = config.challenger.num_queries, config.solver.group_size
    frame = len(chat.encode("", config.solver.system_prompt))
    query = frame + config.challenger.max_tokens
    tokens, micro_batches = _learned(config, N, query, G, config.solver.max_tokens)
    plan = {"queries (N)": N, "answers (N x G)": N * G}
    if config.algorithm != "grpo":
        prompt = max(len(chat.encode(p.text)) for p in challenger_prompts(config))
        plan["challenger prompt, tokens"] = prompt
        more = _learned(config, 1, prompt, N, config.challenger.max_tokens)
        tokens, micro_batches = tokens + more[0], micro_batches + more[1]
    plan["tokens learned from, at most"] = tokens
    plan["micro-batches, at most"] = micro_batches
    plan["optimizer steps of the run"] = config.steps
    return plan


def _learned(config: Config, groups: int, P: int, K: int, T: int) -> tuple[int, int]:
    """(tokens, micro-batches) of groups that are all as long as they may be; see packing."""
    budget = config.learner.tokens_per_micro_batch
    rows = max(1, (budget - P) // T)
    slices = -(-K // rows)
    slices_at_once = max(1, budget // (P + min(K, rows) * T))
    return groups * (slices * P + K * T), -(-groups * slices // slices_at_once)


def memory_estimate(config: Config) -> dict[str, int]:
    """Bytes by part, from the model's own config; activations of one full micro-batch."""
    from language_self_play.pretrained import empty_model, load_model_config

    model_config = load_model_config(config.policy.path)
    text = model_config.get_text_config()
    weights = FLOAT32_BYTES * empty_model(config.policy.path).num_parameters()
    tokens = config.learner.tokens_per_micro_batch
    feed_forward = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # Per token and layer: about 8 hidden-sized and 4 feed-forward-sized tensors are kept for the
    # backward pass; the logits are kept as they are and once in the softmax.
    kept = text.num_hidden_layers * (8 * text.hidden_size + 4 * feed_forward)
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    longest = config.challenger.max_tokens + config.solver.max_tokens
    rows = min(config.rollout.batch_size, config.challenger.num_queries * config.solver.group_size)
    cache = 2 * text.num_hidden_layers * kv_heads * head_size * rows * longest * FLOAT32_BYTES
    return {
        "policy": weights,
        "reference": weights if config.needs_reference else 0,
        "gradients": weights,
        "AdamW's moments": 2 * weights,
        "activations of a micro-batch": tokens * kept * FLOAT32_BYTES,
        "logits of a micro-batch": 3 * tokens * text.vocab_size * FLOAT32_BYTES,
        "key-value cache while sampling": cache,
    }
