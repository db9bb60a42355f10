//! What a transfer waits for.

/// A wait, named by what it is for; how long it takes is a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// Sender: a pull waits for its offer.
    Offer,
    /// Sender: the receiver's right to the blocks.
    Lease,
    /// Sender: an aborted id is remembered.
    Memory,
    /// Receiver: time to renew the lease.
    Heartbeat,
    /// Receiver: nothing was heard from the sender.
    Silence,
}
