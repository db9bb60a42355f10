//! How two nodes meet: TLS where they have it, then a hello of each.
//!
//! ```text
//!  receiver ── first bytes ──▶ sender      TLS at both or at neither; else the sender says
//!     │   (handshake under TLS)   │        so in plain text, in place of a hello
//!     ├────────── hello ─────────▶│        version, token, and under TLS the worker that the
//!     │◀───────── hello ──────────┤        certificate names
//! ```

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpStream},
    time::{Duration, Instant},
};

use kvmesh_wire::v1::{Abort, AbortReason, ProtocolVersion, TransferHello, transfer_frame::Frame};
use rustls::{ClientConnection, ServerConnection, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};

use crate::{
    connection::Connection, error::Untrusted, frame, node::Shared, peers::invalid, socket::Socket,
};

/// Version of transfer.proto spoken here.
const MAJOR: u32 = 1;

/// Bytes of one who is turned away that are read, so that it can read why.
const LAST_WORDS: usize = 64 * 1024;

impl Shared {
    /// A peer that came: TLS where there is some, then its hello.
    pub(crate) fn admit(&self, connection: &Connection, socket: &Socket) -> io::Result<()> {
        let mut first = [0; 4];
        socket.until(self.patience()).read_exact(&mut first)?;
        match (&self.settings.tls, frame::begins_tls(first)) {
            (None, false) => self.meet(connection, socket, &first),
            (Some(tls), true) => {
                let tls = ServerConnection::new(tls.accepting()).map_err(io::Error::other)?;
                socket.secure(tls.into(), &first, self.settings.connect_timeout)?;
                self.meet(connection, socket, &[])
            }
            (None, true) => Err(Untrusted::Secured.into()),
            (Some(_), false) => Err(Untrusted::Plain.into()),
        }
    }

    /// Says why a peer is turned away.
    pub(crate) fn turn_away(&self, mut socket: &Socket, why: &Untrusted) {
        let refusal = Frame::Abort(Abort {
            transfer_id: Default::default(),
            reason: AbortReason::Untrusted as i32,
            message: why.to_peer(),
        });
        // TLS has its own words, and they are said. Where the peer is gone already
        // there is nobody to tell.
        if !matches!(why, Untrusted::Handshake(_))
            && socket.write_all(&frame::encode(refusal)).is_err()
        {
            return;
        }
        socket.shutdown(Shutdown::Write);
        // A close while bytes wait to be read is a reset, which may overtake the refusal.
        let until = self.patience();
        let mut left = LAST_WORDS;
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = socket.read_plain(&mut bytes, until) {
            left = left.saturating_sub(n);
            if left == 0 {
                return;
            }
        }
    }

    /// A peer that was reached: TLS, where this node has it.
    pub(crate) fn secure(&self, socket: &Socket) -> io::Result<()> {
        let Some(tls) = &self.settings.tls else {
            return Ok(());
        };
        // Peers are known by their certificates, not by where they are.
        let nowhere = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        let config = tls.connecting().map_err(io::Error::other)?;
        let tls = ClientConnection::new(config, nowhere).map_err(io::Error::other)?;
        socket.secure(tls.into(), &[], self.settings.connect_timeout)?;
        // Before anything is said.
        self.certified(socket).map(drop)
    }

    pub(crate) fn hello(&self) -> Frame {
        Frame::Hello(TransferHello {
            version: Some(ProtocolVersion {
                major: MAJOR,
                minor: 0,
            }),
            worker_id: self.settings.worker_id.clone(),
            incarnation: self.settings.incarnation,
            kv: Some(self.settings.compatibility.clone()),
            block_tokens: self.settings.block_tokens,
            block_bytes: self.pool.block_bytes() as u64,
            shared_memory_name: self.unix_name.clone(),
            pool_blocks: u64::from(self.pool.blocks()),
            token: self
                .settings
                .proof
                .as_ref()
                .map(|p| p.shown())
                .unwrap_or_default(),
        })
    }

    /// Until when a part of a greeting that begins now is waited for.
    fn patience(&self) -> Instant {
        Instant::now() + self.settings.connect_timeout
    }

    /// Reads the peer's hello, of which `first` came already.
    pub(crate) fn meet(
        &self,
        connection: &Connection,
        socket: &Socket,
        first: &[u8],
    ) -> io::Result<()> {
        let certified = self.certified(socket)?;
        let from = first.chain(socket.until(self.patience()));
        let hello = match frame::read(from).map_err(Untrusted::while_greeting)? {
            Some(Frame::Hello(hello)) => hello,
            Some(Frame::Abort(abort)) if abort.reason == AbortReason::Untrusted as i32 => {
                return Err(Untrusted::refused(&abort.message));
            }
            _ => return Err(invalid("no hello")),
        };
        if let Some(certified) = certified
            && certified != hello.worker_id
        {
            let said = hello.worker_id;
            return Err(Untrusted::Name { said, certified }.into());
        }
        if hello.version.as_ref().map(|version| version.major) != Some(MAJOR) {
            return Err(invalid("another major version of the transfer protocol"));
        }
        let proof = self.settings.proof.as_ref();
        if proof.is_some_and(|proof| !proof.accepts(&hello.token)) {
            return Err(invalid("the peer has not the cluster's token"));
        }
        if let Some(misfit) = self.misfit(&hello) {
            let _ = connection.misfit.set(misfit);
        }
        let _ = connection.hello.set(hello);
        Ok(())
    }

    /// The worker that the peer's certificate names. `None`: there is no TLS.
    fn certified(&self, socket: &Socket) -> io::Result<Option<String>> {
        let Some(tls) = &self.settings.tls else {
            return Ok(None);
        };
        let shown = socket.certificate();
        let named = match &shown {
            Some(certificate) => tls.worker(certificate),
            None => Err("none is shown".to_owned()),
        };
        match named {
            Ok(worker) => Ok(Some(worker)),
            Err(why) => Err(Untrusted::Certificate(why).into()),
        }
    }

    /// What keeps a pair from exchanging blocks.
    fn misfit(&self, hello: &TransferHello) -> Option<String> {
        let own = &self.settings.compatibility;
        if hello.kv.as_ref() != Some(own) {
            return Some("model, number type or format of KV differ".into());
        }
        let geometry = (self.settings.block_tokens, self.pool.block_bytes() as u64);
        let theirs = (hello.block_tokens, hello.block_bytes);
        (geometry != theirs)
            .then(|| format!("blocks of {theirs:?} beside {geometry:?} (tokens, bytes)"))
    }

    pub(crate) fn prepare(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        // Whole seconds for the kernel, and not 0.
        let silence = self.settings.lease.max(Duration::from_secs(1));
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(silence))?;
        socket.set_tcp_user_timeout(Some(silence))
    }
}
