//! A worker's own parts in this process: the gate, the board, the connections; and a client for them.

use std::sync::{Arc, Mutex};

use evergate::gate::Gate;
use evergate::http::app::App;
use evergate::http::service::Service;
use evergate::server::client_io::ClientIo;
use evergate::server::connection::limits;
use evergate::server::h1::Connection;
use evergate::server::stream::Stream;
use evergate::tasks::Tasks;
use evergate::telemetry::access::AccessLog;
use evergate_board::{Board, Claim, Phase, Shape, monotonic_ns};
use evergate_core::config::{Facts, Overrides, Source, load};
use evergate_core::exit::Kind;
use evergate_core::redact::Redactor;
use evergate_testkit::raw::post_request;
use evergate_testkit::{FakeUpstream, gateway_config};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use crate::cut::{Cut, Polls};
use crate::until::until;
use crate::{Case, How, LIMIT};

/// The board's row of this worker.
const ROW: u32 = 1;
/// More turns of the runtime than it takes to see that a socket can be read and to read it.
const TURNS: u32 = 8;

pub struct Worker {
    runtime: Runtime,
    app: Arc<App>,
    board: Board,
    /// Access records that were found so far.
    records: Mutex<String>,
    /// Tasks that are there without any request.
    tasks: usize,
}

/// What the client saw.
pub struct Outcome {
    /// Whether the request was let go to its end.
    pub is_complete: bool,
}

impl Worker {
    pub fn start(fake: &FakeUpstream, more: &str) -> Self {
        let text = gateway_config(fake.base_url(), &[], more);
        let facts = Facts { env: &|_| None, cpus: 1, read_file: &|_| Err("no files".into()) };
        let source = Source { name: "evergate.toml", text: &text, dir: "" };
        let loaded = load(Some(&source), &Overrides::default(), &facts).expect("a good configuration");
        let sealed = loaded.sealed;
        let board = Board::create(Shape { children: 4, slots: 32, series: 256, labels: 64 }, 7).unwrap();
        let child = board.child(ROW).unwrap();
        child.claim(&Claim { kind: Kind::Worker, slot: 0, epoch: ROW, generation: 1, spawned_ns: 1 });
        child.set_phase(Phase::Ready);
        child.set_beat_ns(monotonic_ns());
        child.set_accepting(true);
        let places = (sealed.config.workers.slots.min(16), sealed.config.limits.queue);
        let redactor = Arc::new(Redactor::new(std::iter::empty()));
        let log = AccessLog::new(
            board.record_writer(ROW),
            std::fs::File::open("/dev/null").unwrap().into(),
            Arc::clone(&redactor),
        );
        let gate = Gate::new(board.clone(), (ROW, ROW), places, log, Box::new(|| ()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let app = {
            let _context = runtime.enter();
            // No program is asked for.
            let wake: evergate::http::local::Wake = Arc::new(|| {});
            Arc::new(App::new(sealed, gate, Tasks::new("worker"), redactor, &wake).unwrap())
        };
        let clock = app.clock.clone();
        {
            let _context = runtime.enter();
            drop(app.tasks.spawn("clock", async { clock.run().await.unwrap() }));
        }
        let tasks = runtime.metrics().num_alive_tasks();
        Self { runtime, app, board, records: Mutex::default(), tasks }
    }

    /// One request on a connection of its own, dropped after that many polls.
    pub fn run(&self, case: &Case, fake: &FakeUpstream, polls: u32) -> Outcome {
        if case.how == How::Connecting {
            self.app.clients.values().for_each(|client| client.close_idle());
        }
        let id = format!("drop-{polls}");
        self.runtime.block_on(async {
            if case.how == How::InLine {
                let holder = self.connect(u32::MAX).await;
                let index = fake.request_count();
                let held = talk(holder, vec![request(CHAT_PATH, "delay-8", false, "holder")]);
                let both = async {
                    // The place is taken when the holder's request is at the upstream.
                    until("the holder is at the upstream", LIMIT, || fake.request_count() > index).await;
                    self.exchange(case, polls, &id).await
                };
                let (held, outcome) = tokio::join!(held, both);
                assert!(held.contains("200 OK"), "{held}");
                return outcome;
            }
            self.exchange(case, polls, &id).await
        })
    }

    async fn exchange(&self, case: &Case, polls: u32, id: &str) -> Outcome {
        let whole = request(&format!("/v1/{}", case.path), case.model, case.is_stream, id);
        let pieces = if case.how == How::InPieces {
            let (head, rest) = whole.split_at(whole.len() - 20);
            vec![head.to_vec(), rest[..10].to_vec(), rest[10..].to_vec()]
        } else {
            vec![whole]
        };
        let answer = talk(self.connect(polls).await, pieces).await;
        // A stream that ends with an error event ends its body in order, too.
        let is_whole = if case.is_stream { answer.ends_with("0\r\n\r\n") } else { answer.contains("\"usage\"") };
        Outcome { is_complete: answer.contains("200 OK") && is_whole }
    }

    /// A client's connection, served by a task of the worker.
    async fn connect(&self, polls: u32) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let app = Arc::clone(&self.app);
        let stream = Stream::Tcp(accepted.unwrap().0);
        let serving = async move {
            let io = ClientIo::new(stream, limits(&app.sealed.config), app.clock.clone());
            let service = Service::new(Arc::clone(&app), io.shared());
            let service = Cut { service, polls: Polls::new(polls) };
            Connection::new(io, service).await;
        };
        drop(self.app.tasks.spawn("connection", serving));
        client.unwrap()
    }

    /// Nothing is left of the request, and the worker serves on.
    #[track_caller]
    pub fn assert_clean(&self, case: &Case, fake: &FakeUpstream, polls: u32) {
        let at = format!("{} (stream: {}), poll {polls}", case.model, case.is_stream);
        self.runtime.block_on(async {
            let gate = &self.app.gate;
            until(&format!("{at}: no live pass"), LIMIT, || gate.live() == 0).await;
            let rows = self.board.inflight_rows(ROW);
            until(&format!("{at}: no row"), LIMIT, || rows.occupied() == 0).await;
            until(&format!("{at}: nobody waits"), LIMIT, || self.board.child(ROW).unwrap().waiting() == 0).await;
            let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
            until(&format!("{at}: no task, of {}", self.tasks), LIMIT, || tasks() == self.tasks).await;
            until(&format!("{at}: the upstream has heard of every end"), LIMIT, || {
                fake.requests().iter().all(|request| request.end.is_some())
            })
            .await;
            // What is open is idle, and known to both sides.
            let open = || (self.app.upstream_connections() as usize, fake.open_connections());
            until(&format!("{at}: connections are closed or kept"), LIMIT, || open().0 == open().1).await;
            assert!(open().0 <= 2, "{at}: {:?} connections", open());
            let next = talk(self.connect(u32::MAX).await, vec![request(CHAT_PATH, "ok", false, "next")]).await;
            assert!(next.contains("200 OK") && next.contains("Hello"), "{at}: {next}");
            until(&format!("{at}: no live pass behind the next"), LIMIT, || gate.live() == 0).await;
        });
        assert_eq!(self.records_of(&format!("drop-{polls}")).len(), 1, "{at}");
    }

    /// The access records under a client's id.
    fn records_of(&self, id: &str) -> Vec<Value> {
        let mut text = self.records.lock().unwrap();
        let found = self.board.records();
        text.push_str(str::from_utf8(&found.bytes).unwrap());
        self.board.take_records(&found);
        let all = text.lines().map(|line| serde_json::from_str(line).expect("a record"));
        all.filter(|record: &Value| record["client_id"] == id).collect()
    }
}

const CHAT_PATH: &str = "/v1/chat/completions";

fn request(path: &str, model: &str, is_stream: bool, id: &str) -> Vec<u8> {
    // The models of the cases' own sections have no prefix.
    let model = if matches!(model, "two" | "kept") { model.to_owned() } else { format!("fake/{model}") };
    let body =
        json!({"model": model, "stream": is_stream, "input": "x", "messages": [{"role": "user", "content": "x"}]});
    let fields = format!("x-request-id: {id}\r\nconnection: close\r\n");
    post_request(path, &fields, &body.to_string())
}

/// Sends the pieces, each when the one before it has been read, and reads to the end.
async fn talk(mut client: TcpStream, pieces: Vec<Vec<u8>>) -> String {
    let mut is_first = true;
    for piece in pieces {
        if !std::mem::take(&mut is_first) {
            // The connection's task runs, and reads what there is.
            for _ in 0..TURNS {
                tokio::task::yield_now().await;
            }
        }
        // One that is cut at once cannot be written to.
        let _ = client.write_all(&piece).await;
    }
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LIMIT, client.read_to_end(&mut answer)).await.expect("an end");
    String::from_utf8_lossy(&answer).into_owned()
}
