//! Hand-offs without KV: the receiver asks the sender, over TCP, whether a
//! transfer was committed. So a killed, frozen or unreachable sender is felt
//! as in a real transfer.
//!
//! The receiver writes the 16 bytes of a transfer id; the sender answers with
//! one byte, [`COMMITTED`] or [`ABORTED`], when it knows.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::state::State;

const COMMITTED: u8 = b'C';
const ABORTED: u8 = b'A';
/// How long a pull waits for its offer (`--offer-timeout` of PROTOCOLS 3).
const OFFER_TIMEOUT: Duration = Duration::from_secs(2);
/// Ended transfers that are remembered; the oldest go first.
const REMEMBERED: usize = 4_096;

/// Where a transfer stands, as its sender sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    /// A pull came before the placement.
    Awaited,
    Flowing,
    Committed,
    Aborted,
}

/// The transfers that a worker sends.
#[derive(Debug, Default)]
pub(super) struct Offers(Mutex<OfferTable>);

#[derive(Debug, Default)]
struct OfferTable {
    by_id: BTreeMap<Bytes, watch::Sender<Offer>>,
    ended: VecDeque<Bytes>,
}

impl Offers {
    pub(super) fn begin(&self, id: &Bytes) {
        self.set(id, Offer::Flowing);
    }

    pub(super) fn commit(&self, id: &Bytes) {
        self.set(id, Offer::Committed);
    }

    /// Aborts a transfer unless it was committed.
    pub(super) fn abort_if_open(&self, id: &Bytes) {
        if *self.watch(id).borrow() != Offer::Committed {
            self.set(id, Offer::Aborted);
        }
    }

    /// Transfers that are neither committed nor aborted.
    pub(super) fn open(&self) -> u64 {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let flowing = |offer: &watch::Sender<Offer>| *offer.borrow() == Offer::Flowing;
        table.by_id.values().filter(|offer| flowing(offer)).count() as u64
    }

    fn set(&self, id: &Bytes, to: Offer) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        table
            .by_id
            .entry(id.clone())
            .or_insert_with(|| watch::Sender::new(Offer::Awaited))
            .send_replace(to);
        if matches!(to, Offer::Committed | Offer::Aborted) {
            table.ended.push_back(id.clone());
            if table.ended.len() > REMEMBERED
                && let Some(oldest) = table.ended.pop_front()
            {
                table.by_id.remove(&oldest);
            }
        }
    }

    fn watch(&self, id: &Bytes) -> watch::Receiver<Offer> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table
            .by_id
            .entry(id.clone())
            .or_insert_with(|| watch::Sender::new(Offer::Awaited))
            .subscribe()
    }
}

/// Answers pulls until the worker stops.
pub(super) async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut pulls = JoinSet::new();
    loop {
        tokio::select! {
            () = state.stop.cancelled() => return,
            Some(_) = pulls.join_next() => {}
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                let state = Arc::clone(&state);
                pulls.spawn(async move {
                    // A receiver that is gone needs no answer.
                    let _ = answer(stream, &state).await;
                });
            }
        }
    }
}

async fn answer(mut stream: TcpStream, state: &State) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut id = [0; 16];
    stream.read_exact(&mut id).await?;
    let mut offer = state.offers.watch(&Bytes::copy_from_slice(&id));
    let id = Bytes::copy_from_slice(&id);
    let known = timeout(OFFER_TIMEOUT, offer.wait_for(|o| *o != Offer::Awaited))
        .await
        .is_ok_and(|watched| watched.is_ok());
    if !known {
        state.offers.abort_if_open(&id);
    }
    let ended = offer.wait_for(|o| matches!(o, Offer::Committed | Offer::Aborted));
    let verdict = match ended.await.as_deref() {
        Ok(Offer::Committed) => COMMITTED,
        _ => ABORTED,
    };
    stream.write_all(&[verdict]).await
}

/// Waits, as receiver, until the sender has committed.
///
/// # Errors
/// What went wrong, for people.
pub(super) async fn pull(address: &str, id: &Bytes) -> Result<(), String> {
    let failed = |error: io::Error| format!("transfer from {address}: {error}");
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    stream.write_all(id).await.map_err(failed)?;
    match stream.read_u8().await.map_err(failed)? {
        COMMITTED => Ok(()),
        _ => Err(format!("transfer from {address}: aborted or unknown")),
    }
}
