# A worker, and the head of its Ray cluster. With CUDA as torch on PyPI brings it; for CPUs:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   docker build -f deploy/docker/worker.Dockerfile -t expert-pager-worker:0.1.0 .
# --target dev adds models/emo-tiny, for a cluster that cannot fetch a model.
ARG PYTHON=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/expert-pager
# Alone and first: the largest layer, and the one that changes least.
ARG TORCH_INDEX=https://pypi.org/simple
COPY deploy/docker/constraints.txt /src/
RUN /opt/expert-pager/bin/pip install -c /src/constraints.txt --index-url ${TORCH_INDEX} \
    --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE /src/
COPY client /src/client
COPY pager /src/pager
COPY router_service /src/router_service
COPY protos /src/protos
RUN /opt/expert-pager/bin/pip install -c /src/constraints.txt /src/client '/src[serve,otel,grammar]'
COPY --chmod=755 deploy/docker/bin/ /opt/expert-pager/bin/

FROM ${PYTHON} AS runtime
# Ray's daemons outlive the command that starts them: somebody has to reap them. KubeRay before 1.4 starts Ray by a login
# shell, which forgets PATH.
# hadolint ignore=SC2016
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pager && useradd --uid 10001 --gid pager --no-create-home --home-dir /tmp pager \
    && echo 'PATH=/opt/expert-pager/bin:$PATH' > /etc/profile.d/expert-pager.sh
COPY --from=build /opt/expert-pager /opt/expert-pager
# A root that cannot be written to: all that is written goes to /tmp, /dev/shm and the model's volume.
ENV PATH=/opt/expert-pager/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_memory_monitor_refresh_ms=0 MALLOC_ARENA_MAX=1
USER 10001:10001
ENTRYPOINT ["tini", "--"]
CMD ["expert-pager-worker"]

FROM runtime AS dev
COPY models/emo-tiny /opt/models/emo-tiny

FROM runtime AS worker
EXPOSE 6380 9465
