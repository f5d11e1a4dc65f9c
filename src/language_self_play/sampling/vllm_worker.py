"""vLLM in a process of its own, asked over stdin: one JSON line in, one out. See vllm.py.

This file is run by the Python that has vLLM, which need not have this package: of ours it imports nothing but
in_server/lsp_vllm.py, which is alike.

    {"do": "start", …}                                      ->  {"version": s}
    {"do": "load", "folder": F, "version": s}               ->  {"version": s}   all weights, in place
    {"do": "adapter", "folder": F, "version": s}            ->  {"version": s}   a LoRA adapter
    {"do": "sample", "prompts": [ids], "limits", "seeds",
     "n", "temperature", "top_p", "top_k", "stops",
     "base": false}                                         ->  {"version": s, "groups": [[[ids, logprobs]]]}
    {"do": "sleep"}                                         ->  {"version": s}   until the next load
    anything that raises                                    ->  {"error": text}
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Engine:
    """vLLM with the weights of one version of the policy."""

    def __init__(self, request: dict[str, Any]):
        from vllm import LLM

        self.llm = LLM(
            request["folder"],
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",  # of softmax(logits / τ)
            generation_config="vllm",  # the model's own would lay a top-k over what is asked for
            disable_log_stats=True,
            **request["settings"],
        )
        self.version = request["version"]
        self.adapter: Any = None
        self.asleep = False

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        from lsp_vllm import pack_tied_weights

        self._wake()
        folder = request["folder"]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        # vLLM 0.32 forgets two things, and both give wrong tokens (tests/test_vllm.py):
        # on CPUs an output embedding that is tied to the input's keeps its old packed weights,
        self.llm.apply_model(pack_tied_weights)
        # and keys and values of the old weights stay in the prefix cache.
        self.llm.reset_prefix_cache()
        return self._is_now(request)

    def load_adapter(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        self._wake()
        # A name of its own: the prefix cache tells adapters apart by name and folder.
        name, number = f"version-{request['version']}", request["version"] + 1
        if self.adapter is not None:
            self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
        self.adapter = LoRARequest(name, number, request["folder"])
        self.llm.llm_engine.add_lora(self.adapter)  # now: the folder is removed after the reply
        return self._is_now(request)

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        self._wake()
        params = [
            SamplingParams(
                n=request["n"],
                temperature=request["temperature"],
                top_p=request["top_p"],
                top_k=request["top_k"],
                max_tokens=limit,
                seed=seed,
                stop_token_ids=request["stops"],
                ignore_eos=True,  # the chat's stop tokens alone count
                detokenize=False,
                logprobs=0,  # of the sampled token
            )
            for limit, seed in zip(request["limits"], request["seeds"], strict=True)
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
            params,
            use_tqdm=False,
            lora_request=None if request["base"] else self.adapter,
        )
        groups = [
            [
                [
                    list(completion.token_ids),
                    [
                        at[token].logprob
                        for token, at in zip(completion.token_ids, completion.logprobs, strict=True)
                    ],
                ]
                for completion in sorted(output.outputs, key=lambda c: c.index)
            ]
            for output in outputs
        ]
        return {"version": self.version, "groups": groups}

    def sleep(self, request: dict[str, Any]) -> dict[str, Any]:
        """Weights to host memory, keys and values forgotten."""
        self.llm.sleep(level=1)
        self.asleep = True
        return {"version": self.version}

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
        self.asleep = False

    def _is_now(self, request: dict[str, Any]) -> dict[str, Any]:
        self.version = request["version"]
        return {"version": self.version}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout too
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request["do"]:
                case "start":
                    engine = Engine(request)
                    reply = {"version": engine.version}
                case "load":
                    reply = engine.load(request)  # type: ignore[union-attr]
                case "adapter":
                    reply = engine.load_adapter(request)  # type: ignore[union-attr]
                case "sample":
                    reply = engine.sample(request)  # type: ignore[union-attr]
                case "sleep":
                    reply = engine.sleep(request)  # type: ignore[union-attr]
                case unknown:
                    reply = {"error": f"unknown request {unknown!r}"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
