//! `fault-proxy`, with its controls on standard input.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use clap::Args;
use kvmesh_testkit::fault_proxy::{FaultProxy, LinkPlan};
use serde_json::json;

use super::{Outcome, input};

/// Arguments of `fault-proxy`.
///
/// Lines on standard input control it: `up|down` followed by `delay MS`,
/// `stall on|off`, `drop on|off`, `cut BYTES`, `reset BYTES`, `flip OFFSET` or
/// `rate BYTES_PER_S`; and `refuse on|off`, `cut`, `reset`, `heal`,
/// `connections` (prints them), `quit`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Address to listen on. Port 0: a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Address to pass connections on to.
    #[arg(long)]
    upstream: SocketAddr,
}

pub(crate) async fn run(arguments: Arguments) -> Outcome {
    let proxy = FaultProxy::start_on(arguments.listen, arguments.upstream).await?;
    let address = proxy.addr().to_string();
    println!("{}", json!({"address": address, "pid": std::process::id()}));
    let mut lines = input::lines()?;
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["quit"] => return Ok(ExitCode::SUCCESS),
            ["connections"] => println!("{}", json!({"connections": proxy.connections()})),
            _ if control(&proxy, &words).is_some() => {}
            _ => eprintln!("kvmesh-testkit: unknown control: {line}"),
        }
    }
    // Without anybody to control it the proxy passes bytes on until killed.
    std::future::pending().await
}

/// Does what one line says; `None` where it is not understood.
fn control(proxy: &FaultProxy, words: &[&str]) -> Option<()> {
    match words {
        ["heal"] => proxy.heal(),
        ["cut"] => proxy.cut(),
        ["reset"] => proxy.reset(),
        ["refuse", switch] => {
            let on = is_on(switch)?;
            proxy.set(|plan| plan.refuse = on);
        }
        [direction @ ("up" | "down"), what, value] => {
            let change = link_change(what, value)?;
            proxy.set(|plan| match *direction {
                "up" => change(&mut plan.up),
                _ => change(&mut plan.down),
            });
        }
        _ => return None,
    }
    Some(())
}

type Change = Box<dyn FnOnce(&mut LinkPlan)>;

fn link_change(what: &str, value: &str) -> Option<Change> {
    if matches!(what, "stall" | "drop") {
        let on = is_on(value)?;
        let stall = what == "stall";
        return Some(Box::new(move |link| {
            *(if stall {
                &mut link.stall
            } else {
                &mut link.drop
            }) = on;
        }));
    }
    let number: u64 = value.parse().ok()?;
    Some(match what {
        "delay" => Box::new(move |link| link.delay = Duration::from_millis(number)),
        "cut" => Box::new(move |link| link.cut_after = Some(number)),
        "reset" => Box::new(move |link| link.reset_after = Some(number)),
        "flip" => Box::new(move |link| link.flip_at = Some(number)),
        "rate" => Box::new(move |link| link.bytes_per_s = Some(number)),
        _ => return None,
    })
}

fn is_on(switch: &str) -> Option<bool> {
    match switch {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}
