//! How the collector is reached: where it is, over TLS or not, and what it is shown.

use std::{fmt, path::Path, time::Duration};

use http::uri::Authority;
use kvmesh_trust::{ServerTls, ServerTlsError};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataKey, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

/// A collector has to be reached within this ...
const CONNECT: Duration = Duration::from_secs(2);
/// ... and to take a batch within this.
const ANSWER: Duration = Duration::from_secs(10);
/// How often one that says nothing is asked whether it is there, and how long it may take
/// to say so.
const ALIVE: Duration = Duration::from_secs(10);

/// Headers that are gRPC's own.
const RESERVED: &[&str] = &["te", "content-type", "user-agent", "host", "connection"];

/// A connection to a collector over which each call shows what it has to.
pub(super) type Reached = InterceptedService<Channel, Headers>;

/// Where a collector is: `host:port` or `http://host:port`, or `https://host:port` for
/// one that speaks TLS.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    endpoint: Endpoint,
    /// Over TLS.
    pub(crate) secure: bool,
}

impl Address {
    /// `None` where the text is none of them, or empty.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let (secure, authority) = match text.split_once("://") {
            Some(("https", authority)) => (true, authority),
            Some(("http", authority)) => (false, authority),
            Some(_) => return None,
            None => (false, text),
        };
        let authority: Authority = authority.trim_end_matches('/').parse().ok()?;
        authority.port_u16()?;
        let endpoint = match secure {
            true => ServerTls::endpoint(authority.as_str()),
            false => Endpoint::from_shared(format!("http://{authority}")),
        };
        let endpoint = endpoint.ok()?;
        Some(Self { endpoint, secure })
    }
}

/// A collector, not reached yet.
pub(super) struct Collector {
    endpoint: Endpoint,
    tls: Option<ServerTls>,
    headers: Headers,
}

impl Collector {
    /// `ca`: of the authorities of one that speaks TLS.
    ///
    /// # Errors
    /// [`ServerTlsError`] for a file that cannot be used.
    pub(super) fn new(
        address: Address,
        ca: Option<&Path>,
        headers: Headers,
    ) -> Result<Self, ServerTlsError> {
        let ca = ca.map(|ca| ("otlp_ca", ca.to_owned()));
        let tls = ca.map(|ca| ServerTls::open(ca, None, None)).transpose()?;
        // One that vanished without a word is missed, and reached anew.
        let endpoint = address
            .endpoint
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE);
        Ok(Self {
            endpoint,
            tls,
            headers,
        })
    }

    /// Connected when it is used.
    pub(super) fn reach(&self) -> Reached {
        let channel = match &self.tls {
            Some(tls) => tls.channel(&self.endpoint),
            None => self.endpoint.connect_lazy(),
        };
        InterceptedService::new(channel, self.headers.clone())
    }

    /// Takes changed files, for as long as it is polled.
    pub(super) async fn follow(self) {
        match self.tls {
            Some(tls) => tls.follow().await,
            None => std::future::pending().await,
        }
    }
}

/// Headers of each call to the collector. What they say is nobody's to see.
#[derive(Clone, Default)]
pub(crate) struct Headers(Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>);

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

impl Headers {
    /// As OTEL_EXPORTER_OTLP_HEADERS has them: NAME=VALUE with commas between, values
    /// percent-encoded.
    ///
    /// # Errors
    /// What is wrong, without any value.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        let mut headers = Vec::new();
        for (n, part) in text.split(',').map(str::trim).enumerate() {
            if part.is_empty() {
                continue;
            }
            let n = n + 1;
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| format!("part {n} of it has no ="))?;
            let name = name.trim().to_ascii_lowercase();
            let reserved = RESERVED.contains(&name.as_str()) || name.starts_with("grpc-");
            let key = MetadataKey::from_bytes(name.as_bytes()).ok();
            let Some(key) = key.filter(|_| !reserved) else {
                return Err(format!("part {n} of it has a name that no header may have"));
            };
            let mut value = decoded(value.trim())
                .and_then(|value| MetadataValue::try_from(value.as_slice()).ok())
                .ok_or_else(|| format!("the value of {name} is no percent-encoded text"))?;
            value.set_sensitive(true);
            headers.push((key, value));
        }
        Ok(Self(headers))
    }
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.0 {
            request.metadata_mut().append(name.clone(), value.clone());
        }
        Ok(request)
    }
}

/// Without its percent-encoding; `None` where that is broken.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            other => other,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_collector_is_named_by_host_and_port() {
        for (good, secure) in [
            ("127.0.0.1:4317", false),
            ("http://collector:4317", false),
            ("http://[::1]:1/", false),
            ("https://collector:4317", true),
        ] {
            let read = Address::read(good).unwrap();
            assert_eq!(read.secure, secure, "{good}");
        }
        for bad in [
            "",
            "collector",
            "https://collector",
            "ftp://collector:1",
            "http://a:1/v1/traces",
            "a b:1",
        ] {
            assert!(Address::read(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn headers_are_read_as_opentelemetry_writes_them() {
        let mut headers =
            Headers::read(" Authorization = Bearer%20a%2Cb%3d1 ,, x-tenant=one,x-tenant=two")
                .unwrap();
        let shown = headers.call(Request::new(())).unwrap();
        let shown = shown.metadata();
        assert_eq!(shown.get("authorization").unwrap(), "Bearer a,b=1");
        assert!(shown.get("authorization").unwrap().is_sensitive());
        let tenants: Vec<_> = shown.get_all("x-tenant").iter().collect();
        assert_eq!(tenants, ["one", "two"]);
        let printed = format!("{headers:?}");
        assert!(printed.contains("authorization"), "{printed}");
        assert!(
            !printed.contains("Bearer") && !printed.contains("one"),
            "{printed}"
        );
        assert!(Headers::read("").unwrap().0.is_empty());
    }

    #[test]
    fn what_is_no_header_is_refused_and_not_told() {
        for (wrong, says) in [
            ("secret", "part 1 of it has no ="),
            ("a=1,secret", "part 2 of it has no ="),
            ("se cret=1", "part 1"),
            ("x-bin=secret", "part 1"),
            ("grpc-timeout=secret", "part 1"),
            ("te=secret", "part 1"),
            ("a=secret%2", "value of a"),
            ("a=secret%zz", "value of a"),
            ("a=secret%0a", "value of a"),
        ] {
            let refused = Headers::read(wrong).unwrap_err();
            assert!(refused.contains(says), "{refused}");
            assert!(!refused.contains("secret"), "{refused}");
        }
    }
}
