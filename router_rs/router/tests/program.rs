//! The program itself: it starts, serves and ends as its users see it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kvmesh_rpc::v1::inference_client::InferenceClient;
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_wire::v1::{self, generate_request::Input, generate_response::Event};

const LIMIT: Duration = Duration::from_secs(60);

/// A router of its own process. It ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It has ended already where all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmesh-router"));
    command.args(arguments).env_remove("KVMESH_CONFIG");
    command
}

/// Starts it; gives the address that it says it serves on.
fn serve(workers: &str) -> (Program, String) {
    let arguments = ["--listen", "127.0.0.1:0", "--workers", workers];
    let mut program = Program(
        command(&arguments)
            .args(["--drain-delay", "0s"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut line = String::new();
    let stdout = program.0.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let (_, address) = line.trim().split_once("serving on ").expect(&line);
    (program, address.to_owned())
}

fn request() -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "mock".to_owned(),
        input: Some(Input::TokenIds(v1::TokenIds { ids: vec![5, 6, 7] })),
        stopping: Some(v1::Stopping {
            max_tokens: 20,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn it_serves_what_it_is_asked_and_ends_well_by_sigterm() {
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let (mut program, address) = serve(&worker.addr().to_string());
    let mut client = InferenceClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    let until = Instant::now() + LIMIT;
    loop {
        let models = client.list_models(v1::ListModelsRequest {}).await.unwrap();
        if models.into_inner().models.iter().any(|model| model.ready) {
            break;
        }
        assert!(Instant::now() < until, "the model never became ready");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut stream = client.generate(request()).await.unwrap().into_inner();
    let (mut ids, mut finished) = (Vec::new(), None);
    while let Some(message) = stream.message().await.unwrap() {
        match message.event.unwrap() {
            Event::Tokens(tokens) => ids.extend(tokens.ids),
            Event::Finished(end) => finished = Some(end),
            Event::Accepted(_) | Event::Placed(_) => {}
        }
    }
    assert_eq!(ids, worker.tokens().expected(&[5, 6, 7], 20));
    assert_eq!(finished.unwrap().reason(), v1::FinishReason::Length);
    drop((stream, client));
    let terminate = format!("kill -TERM {}", program.0.id());
    let sent = Command::new("sh").args(["-c", &terminate]).status();
    assert!(sent.unwrap().success());
    let ended = tokio::task::spawn_blocking(move || program.0.wait().unwrap());
    let ended = tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap();
    assert!(ended.success(), "{ended}");
}

#[test]
fn a_wrong_setting_is_named_with_what_is_allowed() {
    let ended = command(&["--queue-timeout", "soon"]).output().unwrap();
    assert_eq!(ended.status.code(), Some(2));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(
        said.contains("queue-timeout") && said.contains("unit"),
        "{said}"
    );
}

#[test]
fn it_tells_its_version_and_its_settings() {
    let told = |flag| {
        let ended = command(&[flag]).output().unwrap();
        assert!(ended.status.success());
        String::from_utf8(ended.stdout).unwrap()
    };
    assert!(told("--version").contains(env!("CARGO_PKG_VERSION")));
    let help = told("--help");
    for setting in ["--listen", "--etcd", "--queue-timeout", "KVMESH_LISTEN"] {
        assert!(help.contains(setting), "{setting} is not in\n{help}");
    }
}
