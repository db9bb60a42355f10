//! Frames on a connection: a length of 4 bytes, little-endian, and a
//! `TransferFrame` of that many bytes.

use std::io::{self, Read};

use kvmesh_wire::v1::{TransferFrame, transfer_frame::Frame};
use prost::Message;

/// Longest frame, in bytes.
pub(crate) const MAX_FRAME: usize = 1 << 20;

/// Whether these are the first bytes of TLS (a record with a ClientHello) and not a
/// frame's length: as that they would be more than 64 KiB, which no hello is.
pub(crate) fn begins_tls(first: [u8; 4]) -> bool {
    matches!(first, [0x16, 3, 1..=4, _])
}

/// One frame as it goes over the wire.
pub(crate) fn encode(frame: Frame) -> Vec<u8> {
    let frame = TransferFrame { frame: Some(frame) };
    let mut bytes = Vec::with_capacity(4 + frame.encoded_len());
    bytes.extend_from_slice(&(frame.encoded_len() as u32).to_le_bytes());
    bytes.extend_from_slice(&frame.encode_to_vec());
    bytes
}

/// Reads one frame; `None` for one of a kind that is not known here.
pub(crate) fn read(mut stream: impl Read) -> io::Result<Option<Frame>> {
    let mut len = [0_u8; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "frame of more than 1 MiB",
        ));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    let frame = TransferFrame::decode(bytes::Bytes::from(bytes))
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(frame.frame)
}
