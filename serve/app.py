"""Config -> Ray Serve application: one base model, its replicas, and the HTTP side in front of them.

`serve run serve.app:build config=CONFIG`, `serve deploy` and a KubeRay RayService import `build` from here;
`python -m serve CONFIG` starts the same application on one machine.
"""

from datetime import UTC, datetime
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from pipeline.base_model import BaseModel, load_base_model
from pipeline.config import Config, load_config
from pipeline.engine import TEMPLATE_ARGUMENTS, engine_arguments, vllm_rank
from pipeline.resources import KEEP_MEMORY
from serve.ingress import make_ingress
from serve.server import AdapterServer


def build(arguments: dict[str, str]) -> serve.Application:
    """Build the application from {"config": path, "section.key": value, ...}, as `serve run` hands them over."""
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "config"]
    if "config" not in arguments:
        raise ValueError("serve.app:build needs config=PATH of a TOML file")
    return build_app(load_config(arguments["config"], overrides))


def build_app(config: Config) -> serve.Application:
    """Build the application; ValueError if the base model's folder is not usable."""
    base = load_base_model(config.model.path)
    settings = config.serve
    server = build_llm_deployment(
        _llm_config(config, base),
        deployment_cls=AdapterServer,
        bind_kwargs={"registry": config.publish.registry, "base": base, "settings": settings},
    )
    ingress = serve.deployment(
        make_ingress(settings),
        name="ingress",
        # Twice what the replicas take: who finds them full is told so, and does not wait in front of the ingress.
        max_ongoing_requests=2 * (settings.max_queued + settings.max_requests * settings.max_replicas),
        autoscaling_config={"min_replicas": 1, "max_replicas": max(1, settings.max_replicas // 4)},
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(server, _card(config, base), config)


def _llm_config(config: Config, base: BaseModel) -> LLMConfig:
    settings, cluster = config.serve, config.cluster
    on_gpu = cluster.engine_gpus > 0
    return LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": config.base_name, "model_source": base.path},
            "accelerator_config": {"kind": "gpu" if on_gpu else "cpu"},
            "lora_config": {"max_num_adapters_per_replica": settings.adapters_on_disk},
            "engine_kwargs": engine_arguments(config.model, cluster)
            | {
                "enable_lora": True,
                "max_loras": settings.adapter_slots,
                "max_cpu_loras": settings.adapters_in_memory,
                "max_lora_rank": vllm_rank(settings.max_rank),
                "default_chat_template_kwargs": TEMPLATE_ARGUMENTS,
            }
            # On a CPU, a seeded request whose prompt is read in parts ends the engine.
            | ({} if on_gpu else {"enable_chunked_prefill": False})
            | config.model.engine,
            "deployment_config": {
                "autoscaling_config": {
                    "min_replicas": settings.min_replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.target_requests,
                    "downscale_delay_s": settings.idle_seconds,
                },
                "max_ongoing_requests": settings.max_requests,
                "max_queued_requests": settings.max_queued,
                "health_check_period_s": 5,
                # Ray LLM asks for one more core on a machine without a GPU: the engine's own process.
                "ray_actor_options": {"num_cpus": cluster.engine_cpus - (not on_gpu)},
                "graceful_shutdown_timeout_s": settings.request_timeout_s,
            },
            "runtime_env": None
            if on_gpu
            else {"env_vars": {"OMP_NUM_THREADS": str(cluster.engine_cpus)} | KEEP_MEMORY},
        }
    )


def _card(config: Config, base: BaseModel) -> dict[str, Any]:
    return {
        "id": config.base_name,
        "object": "model",
        "created": int(datetime.now(UTC).timestamp()),
        "owned_by": "base",
        "metadata": {"base_revision": base.revision, "max_model_len": config.model.max_model_len},
    }
