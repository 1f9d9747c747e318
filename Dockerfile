# The image that evaluates and benches exported artifacts: no torch, no compiler, not root.
#
#   docker build -t owl-deploy .
#   docker run --rm -v "$PWD/artifact:/models/artifact:ro" -v "$PWD/report:/work/report" owl-deploy \
#       bench /models/artifact --baseline artifact --out report/run   # report/: writable for uid 10001
#
# Build arguments: BASE, any Debian-like image with python3 >= 3.10, its venv module and useradd; BUILD_BASE, the same
# with g++ for the builder (default: BASE; g++ is then installed from Debian's packages if it is missing); EXTRAS, extras
# of the wheel ("serve", "prune,serve"); VERSION and REVISION, for the labels.
# Where packages come from a private index, hand pip's settings in as a secret, which no layer keeps:
#   docker build --secret id=pip_conf,src=pip.conf -t owl-deploy .
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS builder
ARG EXTRAS=""
WORKDIR /src
RUN command -v g++ > /dev/null \
    || (apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*)
COPY pyproject.toml README.md LICENSE ./
# owl_deploy/{export,bench,recipes} are symlinks to ../export, ../bench and ../recipes: all four or none.
COPY owl_deploy ./owl_deploy
COPY export ./export
COPY bench ./bench
COPY recipes ./recipes
# One environment builds; the other, without pip, is what ships. Files are byte-compiled here (pip's
# default), because the runtime user cannot write beside them. The test suite of numpy goes.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && python3 -m venv --without-pip /opt/owl-deploy \
    && /opt/build/bin/pip --python /opt/owl-deploy/bin/python install --no-cache-dir \
        "$(echo /dist/owl_deploy-*.whl)${EXTRAS:+[${EXTRAS}]}" \
    && find /opt/owl-deploy/lib -type d -name tests -prune -exec rm -r {} +

FROM ${BASE} AS runtime
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="owl-deploy" \
      org.opencontainers.image.description="Evaluates and benches sparse language models on a CPU." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 owl \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin owl \
    && install --directory --owner=10001 --group=10001 /work /models
COPY --from=builder /opt/owl-deploy /opt/owl-deploy
ENV PATH=/opt/owl-deploy/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/models"]
WORKDIR /work
# A number, not a name, so that an orchestrator can check "not root" without reading the image.
USER 10001:10001
ENTRYPOINT ["owl-deploy"]
CMD ["--help"]
