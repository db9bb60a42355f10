#!/bin/sh
# Makes kvmeshv1/ from proto/. Needs protoc-gen-go and protoc-gen-go-grpc on PATH
# (go install) and a Python with grpcio-tools.
set -eu
cd "$(dirname "$0")"
module=kvmesh.invalid/interop
mapping="Mkvmesh/v1/inference.proto=$module/kvmeshv1"
"${PYTHON:-python3}" -m grpc_tools.protoc -I ../../../proto \
	--go_out=. --go_opt="module=$module" --go_opt="$mapping" \
	--go-grpc_out=. --go-grpc_opt="module=$module" --go-grpc_opt="$mapping" \
	kvmesh/v1/inference.proto
