"""`python -m serve.ask NAME "question"`: ask a running endpoint, with OpenAI's own client.

NAME is an adapter, an exact version (name@version), the base model, or `auto`. The answer goes to stdout as it comes;
behind it, the sources and the adapter that `auto` chose go to stderr.
"""

import argparse
import os
import sys

import openai


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.ask", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="adapter, name@version, base model, or auto")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the endpoint")
    parser.add_argument("--retrieval", type=int, default=0, metavar="K", help="put K passages of its corpus before it")
    parser.add_argument("--key", default=os.environ.get("DISTILLERY_API_KEY", "none"), help="else DISTILLERY_API_KEY")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
    extra: dict[str, object] = {}
    try:
        stream = client.chat.completions.create(
            model=options.name,
            messages=[{"role": "user", "content": options.question}],
            max_tokens=options.max_tokens,
            temperature=0,
            stream=True,
            extra_body={"retrieval": options.retrieval} if options.retrieval else None,
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            extra |= (chunk.model_extra or {}).get("distillery") or {}
    except openai.OpenAIError as error:
        print(f"error: {getattr(error, 'message', error)}", file=sys.stderr)
        return 2
    print(flush=True)
    for name, value in extra.items():
        print(f"{name}: {value}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
