"""``/v1/embeddings``: the mean of a text's hidden states after the last norm, scaled to length 1.

A language model is not trained to embed; the mean is what it has. Clients learn so from the header ``SAID``."""

from __future__ import annotations

import asyncio
import base64
import math

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_parallel.generate.requests import Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.serve.answers import Service
from llm_parallel.serve.completions import read_prompts
from llm_parallel.serve.errors import wrong
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.stream import while_connected

SAID = "x-llm-parallel-embedding"


async def embeddings(http: HttpRequest, fields: Fields, service: Service, headers: dict[str, str]) -> Response:
    """Embeds texts. Raises ApiError."""
    served = service.served
    adapter = served.adapter(fields.text("model"))
    form = fields.choice("encoding_format", "float", ("float", "base64"))
    size = service.driver.generator.model_config.hidden_size
    if fields.whole("dimensions", size, 1, 2**31) != size:
        raise wrong(f"dimensions is {fields.raw('dimensions')}, and this model's embeddings have {size}", "dimensions")
    prompts = await asyncio.to_thread(read_prompts, fields, "input", served)
    requests = []
    for prompt in prompts:
        served.most_new_tokens(prompt, None, "input")
        # The generator writes one token, which nobody sees: a prompt's hidden states come with its first one.
        requests.append(Request(0, tuple(prompt), Sampling(max_new_tokens=1), embeds=True, adapter=adapter))
    answers = await service.ask(requests, False)
    await while_connected(http.receive, answers.batch, answers.whole())
    data = []
    for place in range(len(prompts)):
        vector = answers.embeddings[place]
        length = math.hypot(*vector) or 1.0
        unit = [value / length for value in vector]
        shown = unit if form == "float" else base64.b64encode(np.array(unit, "<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": place, "embedding": shown})
    count = sum(map(len, prompts))
    body = {
        "object": "list",
        "data": data,
        "model": fields.text("model") or served.names[0],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    headers[SAID] = "mean of hidden states, length 1"
    return JSONResponse(body, headers=headers)
