//! Calls to etcd: every one with a deadline, at the member that answers.

use std::{
    future::Future,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch::{self, Receiver};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Code, Request, Response, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use crate::{
    error::{RegistryError, SettingsError},
    etcd::{
        etcdserverpb::{
            AuthenticateRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
            RangeRequest, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
            auth_client::AuthClient, kv_client::KvClient, lease_client::LeaseClient,
            watch_client::WatchClient, watch_request::RequestUnion,
        },
        mvccpb::KeyValue,
    },
    keys::end_of,
    settings::Settings,
    status::Status,
};

/// Answers larger than this are refused. A list comes in pages far below it.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// Keys in one page of a list.
const PAGE_KEYS: i64 = 500;

/// A list of keys, all at one revision.
#[derive(Debug)]
pub(crate) struct List {
    pub(crate) revision: i64,
    pub(crate) entries: Vec<KeyValue>,
}

/// A watch that runs, at one member.
pub(crate) struct OpenWatch {
    pub(crate) requests: tokio::sync::mpsc::Sender<WatchRequest>,
    pub(crate) responses: Streaming<WatchResponse>,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) settings: Settings,
    members: Vec<Channel>,
    /// Takes changed certificates for the connections that are made next.
    _follows: Option<AbortOnDropHandle<()>>,
    /// The member that answered last. Only a hint: any may be asked.
    current: AtomicUsize,
    /// etcd's token for our user. A std mutex, since nothing awaits under it.
    token: Mutex<Option<MetadataValue<Ascii>>>,
    status: watch::Sender<Status>,
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Result<Self, SettingsError> {
        let members = settings.channels()?;
        let follows = settings.tls.clone().map(|tls| tokio::spawn(tls.follow()));
        let status = Status {
            connected: false,
            since: Instant::now(),
            lists: 0,
            watch_breaks: 0,
        };
        Ok(Self {
            settings,
            members,
            _follows: follows.map(AbortOnDropHandle::new),
            current: AtomicUsize::new(0),
            token: Mutex::new(None),
            status: watch::Sender::new(status),
        })
    }

    pub(crate) fn status(&self) -> Receiver<Status> {
        self.status.subscribe()
    }

    pub(crate) fn count_list(&self) {
        self.status.send_modify(|status| status.lists += 1);
    }

    pub(crate) fn count_watch_break(&self) {
        self.status.send_modify(|status| status.watch_breaks += 1);
    }

    /// Says whether etcd answers. Wakes watchers only on a change.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.status.send_if_modified(|status| {
            if status.connected == connected {
                return false;
            }
            status.connected = connected;
            status.since = Instant::now();
            true
        });
    }

    /// Leaves the current member for the next one: its stream was not good.
    pub(crate) fn leave_member(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    /// All keys under a prefix, at one revision.
    pub(crate) async fn list(&self, prefix: &str) -> Result<List, RegistryError> {
        let mut list = List {
            revision: 0,
            entries: Vec::new(),
        };
        let mut from = prefix.as_bytes().to_vec();
        loop {
            let request = RangeRequest {
                key: from,
                range_end: end_of(prefix),
                limit: PAGE_KEYS,
                // Later pages are of the first one's revision.
                revision: list.revision,
            };
            let answer = self
                .call("list", request, |channel, request| async move {
                    KvClient::new(channel)
                        .max_decoding_message_size(MAX_MESSAGE_BYTES)
                        .range(request)
                        .await
                })
                .await?;
            if list.revision == 0 {
                list.revision = answer.header.as_ref().map_or(0, |h| h.revision);
            }
            let last = answer.kvs.last().map(|kv| kv.key.clone());
            list.entries.extend(answer.kvs);
            match last {
                Some(mut next) if answer.more => {
                    next.push(0);
                    from = next;
                }
                _ => return Ok(list),
            }
        }
    }

    /// One key; None where it is not there.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<KeyValue>, RegistryError> {
        let request = RangeRequest {
            key: key.as_bytes().to_vec(),
            ..RangeRequest::default()
        };
        let answer = self
            .call("get", request, |channel, request| async move {
                KvClient::new(channel).range(request).await
            })
            .await?;
        Ok(answer.kvs.into_iter().next())
    }

    pub(crate) async fn transact(&self, request: TxnRequest) -> Result<TxnResponse, RegistryError> {
        self.call("transaction", request, |channel, request| async move {
            KvClient::new(channel).txn(request).await
        })
        .await
    }

    /// Makes a lease; its number.
    pub(crate) async fn grant(&self, ttl: Duration) -> Result<i64, RegistryError> {
        let request = LeaseGrantRequest {
            ttl: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            id: 0,
        };
        let answer = self
            .call("lease grant", request, |channel, request| async move {
                LeaseClient::new(channel).lease_grant(request).await
            })
            .await?;
        if answer.error.is_empty() {
            return Ok(answer.id);
        }
        Err(RegistryError::Rejected {
            operation: "lease grant",
            reason: answer.error,
        })
    }

    /// Renews a lease; false where it is gone. A stream for each renewal: it
    /// fails over like any other call, and a renewal every few seconds costs
    /// nothing.
    pub(crate) async fn keep_alive(&self, lease: i64) -> Result<bool, RegistryError> {
        let request = LeaseKeepAliveRequest { id: lease };
        let answer = self
            .call("lease keep-alive", request, |channel, request| async move {
                let (metadata, extensions, message) = request.into_parts();
                let once = tokio_stream::once(message);
                let request = Request::from_parts(metadata, extensions, once);
                let mut answers = LeaseClient::new(channel)
                    .lease_keep_alive(request)
                    .await?
                    .into_inner();
                let answer = answers.message().await?;
                answer
                    .map(Response::new)
                    .ok_or_else(|| tonic::Status::unavailable("the stream ended"))
            })
            .await?;
        Ok(answer.ttl > 0)
    }

    /// Ends a lease, and so deletes its keys.
    pub(crate) async fn revoke(&self, lease: i64) -> Result<(), RegistryError> {
        let request = LeaseRevokeRequest { id: lease };
        self.call("lease revoke", request, |channel, request| async move {
            LeaseClient::new(channel).lease_revoke(request).await
        })
        .await
        .map(drop)
    }

    /// Opens a watch over a prefix, from a revision on.
    pub(crate) async fn watch(
        &self,
        prefix: &str,
        start_revision: i64,
    ) -> Result<OpenWatch, RegistryError> {
        let create = WatchCreateRequest {
            key: prefix.as_bytes().to_vec(),
            range_end: end_of(prefix),
            start_revision,
        };
        let create = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        self.call("watch", create, |channel, request| async move {
            let (metadata, extensions, create) = request.into_parts();
            // Holds the create and the one progress request that may be out.
            let (requests, queue) = tokio::sync::mpsc::channel(2);
            requests
                .try_send(create)
                .map_err(|error| tonic::Status::internal(error.to_string()))?;
            let stream = ReceiverStream::new(queue);
            let request = Request::from_parts(metadata, extensions, stream);
            let responses = WatchClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .watch(request)
                .await?
                .into_inner();
            Ok(Response::new(OpenWatch {
                requests,
                responses,
            }))
        })
        .await
    }

    /// Calls each member at most once, the one that answered last first.
    async fn call<Q, A, F, Fut>(
        &self,
        operation: &'static str,
        message: Q,
        call: F,
    ) -> Result<A, RegistryError>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, tonic::Status>>,
    {
        let mut reason = String::new();
        for _ in 0..self.members.len() {
            let at = self.current.load(Ordering::Relaxed);
            let channel = self.members[at % self.members.len()].clone();
            match self.call_member(channel, &message, &call).await {
                Ok(answer) => {
                    self.set_connected(true);
                    return Ok(answer);
                }
                Err(status) if is_final(status.code()) => {
                    self.set_connected(true);
                    return Err(RegistryError::Rejected {
                        operation,
                        reason: status.message().to_owned(),
                    });
                }
                Err(status) => {
                    reason = describe(&status);
                    // Only if no other call has moved on meanwhile.
                    let _ = self.current.compare_exchange(
                        at,
                        at.wrapping_add(1),
                        Ordering::Relaxed,
                        Ordering::Relaxed,
                    );
                }
            }
        }
        self.set_connected(false);
        Err(RegistryError::Unreachable { operation, reason })
    }

    /// One call at one member, with a token where there is a user. A token that
    /// etcd no longer knows is replaced once.
    async fn call_member<Q, A, F, Fut>(
        &self,
        channel: Channel,
        message: &Q,
        call: &F,
    ) -> Result<A, tonic::Status>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, tonic::Status>>,
    {
        for fresh in [false, true] {
            let mut request = Request::new(message.clone());
            // A member cut off from its majority is to say so.
            request
                .metadata_mut()
                .insert("hasleader", MetadataValue::from_static("true"));
            if let Some(token) = self.token(&channel, fresh).await? {
                request.metadata_mut().insert("token", token);
            }
            match within(self.settings.call_timeout, call(channel.clone(), request)).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) if !fresh && self.is_stale_token(&status) => {}
                Err(status) => return Err(status),
            }
        }
        Err(tonic::Status::unauthenticated(
            "the token was refused twice",
        ))
    }

    fn is_stale_token(&self, status: &tonic::Status) -> bool {
        self.settings.credentials.is_some()
            && (status.code() == Code::Unauthenticated
                || status.message().contains("invalid auth token"))
    }

    async fn token(
        &self,
        channel: &Channel,
        fresh: bool,
    ) -> Result<Option<MetadataValue<Ascii>>, tonic::Status> {
        let Some(credentials) = &self.settings.credentials else {
            return Ok(None);
        };
        if !fresh && let Some(token) = self.held_token().clone() {
            return Ok(Some(token));
        }
        let request = AuthenticateRequest {
            name: credentials.user.clone(),
            password: credentials.password.clone(),
        };
        let mut client = AuthClient::new(channel.clone());
        let answer = within(self.settings.call_timeout, client.authenticate(request)).await?;
        let token: MetadataValue<Ascii> = answer
            .into_inner()
            .token
            .parse()
            .map_err(|_| tonic::Status::internal("etcd's token is no metadata value"))?;
        *self.held_token() = Some(token.clone());
        Ok(Some(token))
    }

    fn held_token(&self) -> std::sync::MutexGuard<'_, Option<MetadataValue<Ascii>>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn within<A>(
    limit: Duration,
    call: impl Future<Output = Result<A, tonic::Status>>,
) -> Result<A, tonic::Status> {
    tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
        Err(tonic::Status::deadline_exceeded(format!(
            "no answer within {limit:?}"
        )))
    })
}

/// Whether another member or another try would say the same.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

fn describe(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}
