//! A TCP proxy that breaks connections in chosen ways, changeable while it
//! runs.

mod link;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use link::{Ended, pump};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// What happens to the bytes of one direction. `Default` passes them on.
///
/// Offsets count, on each connection, from the moment when the plan was set or
/// the connection began, whichever was later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkPlan {
    /// Each byte arrives later by this.
    pub delay: Duration,
    /// Nothing is read or written, connections stay open.
    pub stall: bool,
    /// Bytes are read and thrown away, connections stay open.
    pub drop: bool,
    /// After so many bytes both directions are closed in order (FIN).
    pub cut_after: Option<u64>,
    /// After so many bytes the connection is reset (RST).
    pub reset_after: Option<u64>,
    /// The lowest bit of the byte at this offset is flipped.
    pub flip_at: Option<u64>,
    /// Bytes a second. `None`: no limit.
    pub bytes_per_s: Option<u64>,
}

/// What happens to connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyPlan {
    /// From the client to the server.
    pub up: LinkPlan,
    /// From the server to the client.
    pub down: LinkPlan,
    /// New connections are reset at once.
    pub refuse: bool,
    /// Raised to close the connections there are.
    close: Closes,
}

/// How often the connections were to be closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Closes {
    cuts: u64,
    resets: u64,
}

/// A proxy that runs. Dropping it closes all its connections.
#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    plan: watch::Sender<ProxyPlan>,
    open: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl FaultProxy {
    /// Listens on a free loopback port and passes connections on to
    /// `upstream`.
    ///
    /// # Errors
    /// Where no port can be bound.
    pub async fn start(upstream: SocketAddr) -> io::Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), upstream).await
    }

    /// The same, listening on `listen`.
    ///
    /// # Errors
    /// Where the address cannot be bound.
    pub async fn start_on(listen: SocketAddr, upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let addr = listener.local_addr()?;
        let (plan, plans) = watch::channel(ProxyPlan::default());
        let open = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(accept(listener, upstream, plans, Arc::clone(&open)));
        Ok(Self {
            addr,
            plan,
            open,
            task,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what happens from now on.
    pub fn set(&self, change: impl FnOnce(&mut ProxyPlan)) {
        self.plan.send_modify(change);
    }

    /// Passes everything on again.
    pub fn heal(&self) {
        self.set(|plan| {
            *plan = ProxyPlan {
                close: plan.close,
                ..ProxyPlan::default()
            };
        });
    }

    /// Closes the connections there are, in order (FIN).
    pub fn cut(&self) {
        self.set(|plan| plan.close.cuts += 1);
    }

    /// Resets the connections there are (RST).
    pub fn reset(&self) {
        self.set(|plan| plan.close.resets += 1);
    }

    /// Connections open now.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    upstream: SocketAddr,
    plans: watch::Receiver<ProxyPlan>,
    open: Arc<AtomicU64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                // An accept fails for a connection that is gone already.
                let Ok((client, _)) = accepted else { continue };
                if plans.borrow().refuse {
                    let _ = client.set_zero_linger();
                    continue;
                }
                let counted = Counted::new(&open);
                let plans = plans.clone();
                connections.spawn(async move {
                    let _counted = counted;
                    // An end that cannot be reached closes the other one.
                    let _ = connection(client, upstream, plans).await;
                });
            }
        }
    }
}

/// Counts a connection while it lives.
struct Counted(Arc<AtomicU64>);

impl Counted {
    fn new(open: &Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connection(
    mut client: TcpStream,
    upstream: SocketAddr,
    plans: watch::Receiver<ProxyPlan>,
) -> io::Result<()> {
    let mut server = TcpStream::connect(upstream).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ended = {
        let (client_in, client_out) = client.split();
        let (server_in, server_out) = server.split();
        let up = pump(client_in, server_out, plans.clone(), |plan| &plan.up);
        let down = pump(server_in, client_out, plans.clone(), |plan| &plan.down);
        tokio::pin!(up, down);
        let (mut up_done, mut down_done) = (false, false);
        loop {
            let ended = tokio::select! {
                ended = closed(plans.clone()) => ended,
                ended = &mut up, if !up_done => { up_done = true; ended }
                ended = &mut down, if !down_done => { down_done = true; ended }
            };
            // A half-closed connection goes on in its other direction.
            if ended != Ended::Finished || (up_done && down_done) {
                break ended;
            }
        }
    };
    if ended == Ended::Reset {
        client.set_zero_linger()?;
        server.set_zero_linger()?;
    }
    Ok(())
}

/// Waits until all connections are to be closed.
async fn closed(mut plans: watch::Receiver<ProxyPlan>) -> Ended {
    let before = plans.borrow().close;
    loop {
        if plans.changed().await.is_err() {
            return Ended::Cut;
        }
        let now = plans.borrow_and_update().close;
        if now.resets != before.resets {
            return Ended::Reset;
        }
        if now.cuts != before.cuts {
            return Ended::Cut;
        }
    }
}
