//! Load on a worker itself: a raw Attach client that keeps a number of
//! requests running and counts their tokens.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_wire::v1::{
    Continuation, Place, ProtocolVersion, ResolvedSampling, RouterFrame, RouterHello, Stage,
    StepOutput, WorkerFrame, opening::Answer, router_frame::Frame, stage_end::End, worker_frame,
};
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::LoadError;
use crate::process::{Usage, Watched};

/// How long a worker may take for its hello.
const HELLO: Duration = Duration::from_secs(30);

/// What load to bring to a worker.
#[derive(Clone, Debug)]
pub struct AttachConfig {
    /// gRPC address of the worker.
    pub target: SocketAddr,
    /// Requests at the same time.
    pub streams: usize,
    /// Prompt length, tokens.
    pub prompt_tokens: u32,
    /// Output length, tokens.
    pub max_tokens: u32,
    /// Time before anything counts.
    pub warm_up: Duration,
    /// Time that counts.
    pub window: Duration,
    /// Process whose CPU time in the window is reported.
    pub watch_pid: Option<u32>,
}

/// What came of it. Counts are of the window.
#[derive(Clone, Debug, Serialize)]
pub struct AttachFigures {
    /// Length of the window, s.
    pub seconds: f64,
    /// Tokens received.
    pub tokens: u64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Frames with tokens.
    pub frames: u64,
    /// Tokens a frame.
    pub tokens_per_frame: f64,
    /// Stages that ended as `finished`.
    pub finished: u64,
    /// Placements refused, and stages that ended otherwise.
    pub errors: u64,
    /// The watched process.
    pub watched: Option<Watched>,
}

/// Keeps `streams` requests running on a worker and counts.
///
/// # Errors
/// Where the worker cannot be reached, refuses the session or ends it.
pub async fn attach(config: AttachConfig) -> Result<AttachFigures, LoadError> {
    let mut load = AttachLoad::open(config.clone()).await?;
    for _ in 0..config.streams {
        load.place().await?;
    }
    let begin = tokio::time::Instant::now() + config.warm_up;
    load.read_until(begin).await?;
    let read = || config.watch_pid.and_then(|pid| Usage::of(pid).ok());
    let before = read();
    load.reset();
    let began = Instant::now();
    load.read_until(begin + config.window).await?;
    let seconds = began.elapsed().as_secs_f64();
    let after = read();
    Ok(AttachFigures {
        seconds,
        tokens: load.tokens,
        tokens_per_s: load.tokens as f64 / seconds,
        frames: load.frames,
        tokens_per_frame: load.tokens as f64 / load.frames.max(1) as f64,
        finished: load.finished,
        errors: load.errors,
        watched: before
            .zip(after)
            .map(|(before, after)| Watched::between(before, after, load.tokens)),
    })
}

struct AttachLoad {
    config: AttachConfig,
    model: String,
    commands: mpsc::Sender<RouterFrame>,
    frames_in: Streaming<WorkerFrame>,
    number: u64,
    tokens: u64,
    frames: u64,
    finished: u64,
    errors: u64,
}

impl AttachLoad {
    async fn open(config: AttachConfig) -> Result<Self, LoadError> {
        let failed = |error: &dyn std::error::Error| LoadError::Attach(error.to_string());
        let channel = Endpoint::from_shared(format!("http://{}", config.target))
            .map_err(|error| failed(&error))?
            .tcp_nodelay(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .connect()
            .await
            .map_err(|error| failed(&error))?;
        let (commands, outbound) = mpsc::channel(1024);
        let hello = RouterHello {
            version: Some(ProtocolVersion { major: 1, minor: 0 }),
            router_id: format!("load-{}", std::process::id()),
            router_incarnation: rand::random(),
            ..Default::default()
        };
        let hello = RouterFrame {
            number: 0,
            frame: Some(Frame::Hello(hello)),
        };
        commands.send(hello).await.map_err(|error| failed(&error))?;
        let mut frames_in = WorkerClient::new(channel)
            .attach(ReceiverStream::new(outbound))
            .await
            .map_err(|status| failed(&status))?
            .into_inner();
        let first = timeout(HELLO, frames_in.message())
            .await
            .map_err(|error| failed(&error))?
            .map_err(|status| failed(&status))?;
        let Some(worker_frame::Frame::Hello(hello)) = first.and_then(|frame| frame.frame) else {
            return Err(LoadError::Attach("no hello".to_owned()));
        };
        let model = hello.record.and_then(|record| record.model);
        Ok(Self {
            config,
            model: model.unwrap_or_default().name,
            commands,
            frames_in,
            number: 0,
            tokens: 0,
            frames: 0,
            finished: 0,
            errors: 0,
        })
    }

    fn reset(&mut self) {
        (self.tokens, self.frames, self.finished, self.errors) = (0, 0, 0, 0);
    }

    async fn place(&mut self) -> Result<(), LoadError> {
        self.number += 1;
        let number = self.number as u32;
        let prompt_ids = (0..self.config.prompt_tokens.max(1))
            .map(|n| 16 + (n * 7 + number) % 200)
            .collect();
        let place = Place {
            generation: rand::random::<u128>().to_be_bytes().to_vec().into(),
            owner: 1,
            attempt: 1,
            continuation: Some(Continuation {
                model: self.model.clone(),
                prompt_ids,
                sampling: Some(ResolvedSampling {
                    top_p: 1.0,
                    repetition_penalty: 1.0,
                    ..Default::default()
                }),
                max_tokens: self.config.max_tokens,
                ..Default::default()
            }),
            stage: Stage::Whole as i32,
            ..Default::default()
        };
        let frame = RouterFrame {
            number: self.number,
            frame: Some(Frame::Place(place)),
        };
        self.commands
            .send(frame)
            .await
            .map_err(|_| LoadError::Attach("the session ended".to_owned()))
    }

    async fn read_until(&mut self, until: tokio::time::Instant) -> Result<(), LoadError> {
        let timer = sleep_until(until);
        tokio::pin!(timer);
        loop {
            let frame = tokio::select! {
                () = &mut timer => return Ok(()),
                frame = self.frames_in.message() => frame,
            };
            let frame = frame
                .map_err(|status| LoadError::Attach(status.to_string()))?
                .ok_or_else(|| LoadError::Attach("the session ended".to_owned()))?;
            if let Some(worker_frame::Frame::Step(step)) = frame.frame {
                for _ in 0..self.count(&step) {
                    self.place().await?;
                }
            }
        }
    }

    /// Counts a step; gives the number of requests that are to be replaced.
    fn count(&mut self, step: &StepOutput) -> usize {
        if let Some(rows) = &step.tokens {
            self.tokens += rows.ids.len() as u64;
            self.frames += 1;
        }
        let refused = |opening: &&kvmesh_wire::v1::Opening| {
            matches!(opening.answer, Some(Answer::Refused(_)))
        };
        let refused = step.openings.iter().filter(refused).count();
        let finished = |end: &&kvmesh_wire::v1::StageEnd| matches!(end.end, Some(End::Finished(_)));
        let finished = step.ends.iter().filter(finished).count();
        self.finished += finished as u64;
        self.errors += (refused + step.ends.len() - finished) as u64;
        step.ends.len()
    }
}
