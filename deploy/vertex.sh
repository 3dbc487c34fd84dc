#!/bin/sh
# Uploads the image as a model of Vertex AI; `gcloud ai endpoints create` and `gcloud ai endpoints deploy-model` deploy it.
# Vertex AI sets AIP_HTTP_PORT and the routes in the container. AIP_STORAGE_URI is a bucket there, and bundles are mapped
# from local files, so the image must hold them. In a folder with the versions in bundles/:
#   printf 'FROM jaxembed-server\nCOPY bundles /bundles\n' | docker build -t "$IMAGE" -f - . && docker push "$IMAGE"
set -eu
: "${PROJECT:?}" "${REGION:?}" "${IMAGE:?}"
gcloud ai models upload --project="$PROJECT" --region="$REGION" --display-name=jaxembed \
  --container-image-uri="$IMAGE" --container-args=/bundles \
  --container-ports=8080 --container-health-route=/v2/health/ready --container-predict-route=/predict
