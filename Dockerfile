# The image of web server, daemon, code server, runs, workers and commands. No secret belongs into it, and none is an
# argument of its build. For production name the base by its digest: --build-arg PYTHON_IMAGE=python:3.12-slim@sha256:…
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /build
RUN python -m venv /opt/builder && python -m venv /opt/alphapulse
COPY deploy/docker/build.lock deploy/docker/requirements.lock ./
RUN /opt/builder/bin/python -m pip install --require-hashes -r build.lock
RUN /opt/alphapulse/bin/python -m pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY alphapulse_encryption ./alphapulse_encryption
RUN /opt/builder/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/alphapulse/bin/python -m pip install --no-deps --no-index dist/*.whl

# What the chart calls is the web server behind its gate, and nothing else of that name is there.
RUN printf '#!/opt/alphapulse/bin/python\nfrom alphapulse_encryption import secrecy\nfrom alphapulse_encryption.ui.server import main\n\nsecrecy.run_program(main)\n' \
        > /opt/alphapulse/bin/dagster-webserver \
    && rm -f /opt/alphapulse/bin/dagit

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 alphapulse \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/alphapulse alphapulse \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/alphapulse \
    && install -d -o 10001 -g 10001 -m 0755 /opt/dagster/dagster_home
COPY --from=build /opt/alphapulse /opt/alphapulse
ENV PATH=/opt/alphapulse/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DAGSTER_HOME=/opt/dagster/dagster_home \
    ALPHAPULSE_STATE_DIR=/var/lib/alphapulse
WORKDIR /var/lib/alphapulse
USER 10001:10001
CMD ["python", "-m", "alphapulse_encryption", "--help"]
