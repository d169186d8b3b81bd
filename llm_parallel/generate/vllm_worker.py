"""The other side of ``vllm_engine.py``: runs in the Python that has vLLM, and imports nothing else of this repository.

A line of JSON comes in, one goes out. First the arguments of ``vllm.LLM``, answered with vLLM's version; then again and
again requests that are new, answered with those that were finished since, a second later if there are none. The end of
the input ends the process.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Takes the place of the standard output for itself, since vLLM logs there."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    try:
        import vllm

        engine = vllm.LLM(**json.loads(sys.stdin.readline())).llm_engine
        say({"version": vllm.__version__})
        for line in sys.stdin:
            for request in json.loads(line):
                given = request["sampling"]
                if "logit_bias" in given:  # JSON has only texts as names
                    given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
                params = vllm.SamplingParams(**given, output_kind=_final_only())
                engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, params)
            finished: list[dict[str, Any]] = []
            until = time.monotonic() + 1.0
            while not finished and engine.has_unfinished_requests() and time.monotonic() < until:
                finished = [_described(found) for found in engine.step() if found.finished]
            say({"finished": finished})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _described(found: Any) -> dict[str, Any]:
    (answer,) = found.outputs
    tokens = list(answer.token_ids)
    choices = answer.logprobs or []
    return {
        "id": found.request_id,
        "tokens": tokens,
        "reason": answer.finish_reason,
        "log_probs": [held[token].logprob for token, held in zip(tokens, choices)],
        "top": [
            [[token, one.logprob] for token, one in sorted(held.items(), key=lambda pair: pair[1].rank)]
            for held in choices
        ],
    }


if __name__ == "__main__":
    main()
