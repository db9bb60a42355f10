//! gRPC reflection, both versions: grpcio speaks v1alpha, newer tools v1.

use std::convert::Infallible;

use http::{Request, Response};
use hyper::body::Incoming;
use tonic_reflection::server::{Builder, Error};
use tower::{ServiceExt, util::BoxCloneSyncService};

use super::body::ResponseBody;
use crate::vllm;

type Service = BoxCloneSyncService<Request<Incoming>, Response<tonic::body::Body>, Infallible>;

/// Both services. Their pool of descriptors takes milliseconds to build: it is
/// built once, and a call clones what points to it.
pub(crate) struct Reflection {
    v1: Service,
    v1alpha: Service,
}

impl Reflection {
    /// What a router serves.
    ///
    /// # Errors
    /// Descriptors of ours that cannot be read.
    pub(crate) fn new() -> Result<Self, Error> {
        Self::of(&[
            kvmesh_wire::FILE_DESCRIPTOR_SET,
            kvmesh_wire::FOREIGN_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
        ])
    }

    fn of(descriptors: &[&'static [u8]]) -> Result<Self, Error> {
        let builder = || {
            let mut builder = Builder::configure();
            for set in descriptors {
                builder = builder.register_encoded_file_descriptor_set(set);
            }
            builder
                .with_service_name("kvmesh.v1.Inference")
                .with_service_name("kvmesh.v1.Admin")
                .with_service_name(vllm::ENGINE)
                .with_service_name(vllm::INFERENCE)
                .with_service_name(vllm::CONTROL)
                .with_service_name("grpc.health.v1.Health")
        };
        Ok(Self {
            v1: BoxCloneSyncService::new(builder().build_v1()?),
            v1alpha: BoxCloneSyncService::new(builder().build_v1alpha()?),
        })
    }

    /// Answers a call of either version.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let path = request.uri().path();
        let service = match path.starts_with("/grpc.reflection.v1alpha.") {
            true => self.v1alpha.clone(),
            false => self.v1.clone(),
        };
        match service.oneshot(request).await {
            Ok(response) => response.map(ResponseBody::Reflection),
            Err(never) => match never {},
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_read_when_it_is_made_and_not_with_a_call() {
        assert!(Reflection::new().is_ok());
        assert!(Reflection::of(&[b"no descriptors"]).is_err());
    }
}
