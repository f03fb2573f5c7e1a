"""Rounds of vLLM for the engine benchmark, run with the interpreter of vLLM's own environment.

    python vllm_rounds.py '{"model": FOLDER, ...}' THREADS

Every line on stdin is a round: {"prompts": [[token id, ...], ...], "params": {...}}. The answer is a line with the
number of tokens sampled and the seconds taken. All prompts of a round wait from its start.
"""

from __future__ import annotations

import json
import os
import sys
import time

# vLLM in this process, on every core: its fastest configuration on a CPU.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": sys.argv[2],
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints to stdout
    from vllm import LLM, SamplingParams

    llm = LLM(
        **json.loads(sys.argv[1]),
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=True,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    for line in sys.stdin:
        question = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
        params = SamplingParams(**question["params"], logprobs=0, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        made = llm.generate(prompts, params, use_tqdm=False) if prompts else []
        seconds = time.perf_counter() - began
        tokens = sum(len(output.token_ids) for group in made for output in group.outputs)
        answers.write(json.dumps({"tokens": tokens, "seconds": seconds, "vocabulary": vocabulary}) + "\n")


if __name__ == "__main__":
    main()
