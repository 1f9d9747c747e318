# The image that serves, evaluates and benches exported artifacts on a CPU: no torch, no compiler, not root.
#
#   docker build -t owl-deploy .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v "$PWD/artifact:/models:ro" owl-deploy
#   docker run --rm -v "$PWD/artifact:/models:ro" -v "$PWD/report:/work/report" owl-deploy \
#       bench /models --baseline models --out report/run   # report/: writable for uid 10001
#
# Build arguments: BASE, any Debian-like image with python3 >= 3.10, its venv module and useradd; BUILD_BASE, the same
# with g++ for building the wheel (default: BASE; g++ is then installed from Debian's packages if it is missing);
# ARTIFACT, "artifact" copies the folder of that name into the image as /models; EXTRAS, extras of the wheel; VERSION and
# REVISION, for the labels.
# Where packages come from a private index, hand pip's settings in as a secret, which no layer keeps:
#   docker build --secret id=pip_conf,src=pip.conf -t owl-deploy .
# What is inside, as CycloneDX: /usr/share/owl-deploy/sbom.cdx.json.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG BUILD_BASE=${BASE}

FROM ${BASE} AS base

FROM ${BUILD_BASE} AS builder
# The wheel beside this file, where there is one; else one made from the source tree, which needs a compiler: whatever
# the base's release has, as it stays behind with this stage. owl_deploy/ has symlinks to the rest: all or none.
# hadolint ignore=DL3003,DL3008
RUN --mount=type=bind,source=.,target=/media \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv /opt/build \
    && mkdir /dist /src \
    && if ! cp /media/owl_deploy-*.whl /dist 2> /dev/null; then \
        command -v g++ > /dev/null \
            || (apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*); \
        cd /media \
        && cp -r pyproject.toml README.md LICENSE Dockerfile docker-compose.yaml \
            owl_deploy export bench recipes deploy /src \
        && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist /src; \
    fi
# One environment builds; the other, without pip, is what ships. Files are byte-compiled here (pip's default), because
# the runtime user cannot write beside them. What only developers and JupyterLab read goes: 30 MB.
ARG EXTRAS="serve"
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv --without-pip /opt/owl-deploy \
    && /opt/build/bin/pip --python /opt/owl-deploy/bin/python install --no-cache-dir \
        "$(echo /dist/owl_deploy-*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && find /opt/owl-deploy/lib -type d \( -name tests -o -path '*/onnx/backend/test' -o -path '*/plotly/labextension' \) \
        -prune -exec rm -r {} + \
    && rm -rf /opt/owl-deploy/share /opt/owl-deploy/etc
# The bill of materials: every Python package above, and every Debian package of the base that ships.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=bind,from=base,source=/var/lib/dpkg,target=/media \
    /opt/build/bin/pip install --no-cache-dir cyclonedx-python-lib==11.12.0 \
    && /opt/build/bin/python /opt/owl-deploy/lib/python3*/site-packages/owl_deploy/package_bill.py \
        /opt/owl-deploy/lib/python3*/site-packages /media/status > /dist/sbom.cdx.json

FROM base AS runtime
RUN groupadd --gid 10001 owl \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin owl \
    && install --directory --owner=10001 --group=10001 /work \
    && install --directory /models
COPY --from=builder /opt/owl-deploy /opt/owl-deploy
COPY --from=builder /dist/sbom.cdx.json /usr/share/owl-deploy/sbom.cdx.json
ARG ARTIFACT=""
RUN --mount=type=bind,source=.,target=/media \
    if [ -n "${ARTIFACT}" ]; then cp -r "/media/${ARTIFACT}/." /models && chmod -R a+rX /models; fi
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="owl-deploy" \
      org.opencontainers.image.description="Serves, evaluates and benches sparse language models on a CPU." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Inside a container only other containers and published ports reach 0.0.0.0; the server says so when it starts.
ENV PATH=/opt/owl-deploy/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OWL_DEPLOY_ARTIFACT=/models \
    OWL_DEPLOY_HOST=0.0.0.0 \
    OWL_DEPLOY_PORT=8000
EXPOSE 8000
WORKDIR /work
# A number, not a name, so that an orchestrator can check "not root" without reading the image.
USER 10001:10001
STOPSIGNAL SIGTERM
# Compose and docker ask; Kubernetes has probes of its own. A model may take a while to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['OWL_DEPLOY_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["owl-deploy"]
CMD ["serve"]
