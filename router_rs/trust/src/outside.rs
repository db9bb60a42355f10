//! TLS to servers that are no part of the cluster, such as etcd: they are known by
//! their names, as on the web.

use std::{io, sync::Arc};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName, sign::SingleCertAndKey};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use crate::{
    followed::{FileError, Followed, Wrong},
    tls::{File, HTTP2, authorities, certified, provider},
};

/// TLS to a server that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerTlsError {
    /// A file that cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A name that is none.
    #[error("{setting} is {value:?}; allowed is the name or the address in a certificate")]
    Name {
        /// The setting.
        setting: &'static str,
        /// What it says.
        value: String,
    },
}

/// What such a server has to show, and what it is shown, out of files that are
/// followed: each connection is made with what is in force then, and goes on with it.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Arc<Followed<ClientConfig>>,
    /// Where its certificate has another name than its address.
    name: Option<ServerName<'static>>,
}

impl ServerTls {
    /// The server's authorities; our certificate and its key, where it asks for one; and
    /// the name in its certificate with the setting that has it, where that is not the
    /// one in its address.
    ///
    /// # Errors
    /// [`ServerTlsError`] for what cannot be read or used.
    pub fn open(
        ca: File,
        identity: Option<(File, File)>,
        name: Option<(&'static str, &str)>,
    ) -> Result<Self, ServerTlsError> {
        let name = name.map(|(setting, value)| {
            let value = value.to_owned();
            ServerName::try_from(value.clone()).map_err(|_| ServerTlsError::Name { setting, value })
        });
        let name = name.transpose()?;
        let mut files = vec![ca];
        if let Some((certificate, key)) = identity {
            files.extend([certificate, key]);
        }
        let config = Followed::open(files, |said, _| {
            let builder = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(|error| Wrong::new(0, error))?
                .with_root_certificates(authorities(said, 0)?);
            let mut config = match said.len() {
                1 => builder.with_no_client_auth(),
                _ => {
                    let key = SingleCertAndKey::from(certified(said, 1)?);
                    builder.with_client_cert_resolver(Arc::new(key))
                }
            };
            config.alpn_protocols = vec![HTTP2.to_vec()];
            Ok(config)
        })?;
        Ok(Self {
            config: Arc::new(config),
            name,
        })
    }

    /// An endpoint for [`ServerTls::channel`] out of "host:port". Calls say https; that
    /// tonic does not know of it leaves TLS to us, who can change it.
    ///
    /// # Errors
    /// Where it is no address.
    pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
        // Of the same form, so it is one, too.
        let origin = Endpoint::from_shared(format!("https://{address}"))?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        Ok(endpoint.origin(origin.uri().clone()))
    }

    /// A channel that is connected when it is used, and again when it has to be.
    #[must_use]
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        let own = self.clone();
        endpoint.connect_with_connector_lazy(service_fn(move |uri| own.clone().dial(uri)))
    }

    async fn dial(self, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(443);
        let name = match self.name {
            Some(name) => name,
            None => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(self.config.now());
        let stream = connector.connect(name, stream).await?;
        if stream.get_ref().1.alpn_protocol() != Some(HTTP2) {
            return Err(io::Error::other("the server speaks no HTTP/2 over TLS"));
        }
        Ok(TokioIo::new(stream))
    }

    /// Takes changed files, for as long as it is polled.
    pub async fn follow(self) {
        self.config.follow_and_log(|_| {}).await;
    }
}
