"""vLLM in its own environment, asked over stdin: one JSON line in, one out. See vllm_side.py.

    {"challenger": [ids], "solver": [[ids], …], "n": [N, G], "length": T}   ->   {"seconds": s}

Its settings: one engine in this process, prompts shared through its prefix cache, each core bound to a
thread of its own, the sampled tokens' log-probs returned (ours returns them too), no texts.
"""

from __future__ import annotations

import json
import os
import sys
import time

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    model, dtype, threads, clock_name, context, eager = sys.argv[1:7]
    replies = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout too
    os.dup2(2, 1)
    cores = sorted(os.sched_getaffinity(0))[: int(threads)]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=int(context),
        enable_prefix_caching=True,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enforce_eager=eager == "eager",
        disable_log_stats=True,
        seed=0,
    )
    clock = CLOCKS[clock_name]
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        roles = [([work["challenger"]], work["n"][0]), (work["solver"], work["n"][1])]
        start = clock()
        for prompts, n in roles:
            params = SamplingParams(
                n=n,
                temperature=1.0,
                max_tokens=work["length"],
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
            )
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            outputs = engine.generate(inputs, params, use_tqdm=False)
            lengths = {len(c.token_ids) for output in outputs for c in output.outputs}
            assert lengths == {work["length"]}, lengths
            assert all(len(output.outputs) == n for output in outputs)
        print(json.dumps({"seconds": clock() - start}), file=replies, flush=True)


if __name__ == "__main__":
    main()
