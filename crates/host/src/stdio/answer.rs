//! What a program says of a request, as an answer in OpenAI's shape.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use evergate_core::chat::{self, Reply};
use evergate_core::{Error, Fault};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};

use super::pool::Place;
use super::process::{Heard, Lost, Order, Work};
use super::said::{Last, Piece, Usage, broken};
use crate::ask::{Ask, Endpoint, Refusal};

/// Pieces that wait for the client; a program waits at its pipe for the rest.
const PIECES: usize = 16;

/// Never used twice, as long as the host lives.
static IDS: AtomicU64 = AtomicU64::new(1);

/// A request that a process was given. Dropping it before its end cancels it.
pub(crate) struct Request {
    id: u64,
    rest: mpsc::Receiver<Heard>,
    end: oneshot::Receiver<Lost>,
    orders: mpsc::Sender<Order>,
    is_over: bool,
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.is_over {
            // A process that hears nothing any more is ending, and this with it.
            let _ = self.orders.try_send(Order::Cancel(self.id));
        }
    }
}

impl Request {
    /// Gives the process of a place a request.
    ///
    /// # Errors
    /// `Unseen` when the process is ending.
    pub(crate) fn send(ask: &Ask, place: Place) -> Result<Self, Lost> {
        let ((to, rest), (end, ended)) = (mpsc::channel(PIECES), oneshot::channel());
        let (id, orders) = (IDS.fetch_add(1, Ordering::Relaxed), place.orders.clone());
        let work = Work { id, ask: ask.clone(), place, to, end };
        orders.try_send(Order::Request(Box::new(work))).map_err(|_| Lost::Unseen)?;
        Ok(Self { id, rest, end: ended, orders, is_over: false })
    }

    /// What comes next. Cancel-safe. Nothing does after the last.
    pub(crate) async fn next(&mut self) -> Result<Heard, Lost> {
        let heard = self.rest.recv().await;
        self.is_over = !matches!(heard, Some(Heard::Piece(_)));
        match heard {
            Some(heard) => Ok(heard),
            None => Err((&mut self.end).await.unwrap_or_else(|_| {
                Lost::Refused(Refusal::after(Error::new(Fault::Internal, "the program of this model was lost")))
            })),
        }
    }
}

/// A request that was heard of cannot be unseen any more.
fn error_of(lost: Lost) -> Error {
    match lost {
        Lost::Refused(refusal) => refusal.error,
        Lost::Unseen => Error::new(Fault::Internal, "the request was lost between two processes"),
    }
}

/// Counts down the bytes of an answer.
struct Budget {
    left: u64,
    has_begun: bool,
}

impl Budget {
    fn take(&mut self, piece: &Piece) -> Result<(), Error> {
        self.has_begun = true;
        let length = match piece {
            Piece::Text(text) => text.len(),
            Piece::Delta(delta) => json!(delta).to_string().len(),
        };
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        self.left = self.left.checked_sub(length).ok_or_else(|| broken("wrote more than an answer may have"))?;
        Ok(())
    }

    /// There must be an answer (G3), and one only.
    fn check(&self, last: &Last) -> Result<(), Error> {
        match (self.has_begun, last.text.is_some(), last.body.is_some()) {
            (false, false, false) => Err(broken("ended a request without an answer")),
            (true, _, true) => Err(broken("wrote an answer in pieces and as a body")),
            _ => Ok(()),
        }
    }
}

/// Makes one answer of everything.
pub(crate) async fn whole(
    ask: &Ask,
    reply: Reply,
    mut heard: Heard,
    mut request: Request,
    bytes_max: u64,
) -> Result<Bytes, Error> {
    let (mut budget, mut message) = (Budget { left: bytes_max, has_begun: false }, Map::new());
    let last = loop {
        match heard {
            Heard::Last(last) => break last,
            Heard::Piece(piece) => {
                budget.take(&piece)?;
                merge(&mut message, object(piece));
            }
        }
        heard = request.next().await.map_err(error_of)?;
    };
    budget.check(&last)?;
    if let Some(body) = last.body {
        return Ok(body);
    }
    if let Some(text) = last.text {
        merge(&mut message, object(Piece::Text(text)));
    }
    compose(ask.endpoint, reply, message, last.usage, last.finish_reason)
}

fn compose(
    endpoint: Endpoint,
    mut reply: Reply,
    message: Map<String, Value>,
    usage: Option<Usage>,
    finish_reason: Option<String>,
) -> Result<Bytes, Error> {
    reply.text = message.get("content").and_then(Value::as_str).unwrap_or_default().to_owned();
    let answer = match endpoint {
        Endpoint::Chat => chat::completion(&reply),
        Endpoint::Completions => chat::text_completion(&reply),
        Endpoint::Embeddings => return Err(broken("answered without embeddings")),
    };
    let has_more = message.keys().any(|key| key != "content" && key != "role");
    if !has_more && usage.is_none() && finish_reason.is_none() {
        return Ok(answer.into());
    }
    let bug = |error| Error::new(Fault::Internal, "an answer could not be put together").detail(error);
    let mut answer: Value = serde_json::from_str(&answer).map_err(bug)?;
    if let Some(choice) = answer.pointer_mut("/choices/0").and_then(Value::as_object_mut) {
        if let Some(reason) = finish_reason {
            choice.insert("finish_reason".into(), reason.into());
        }
        if let Some(own) = choice.get_mut("message").and_then(Value::as_object_mut) {
            if !message.contains_key("content") {
                own.insert("content".into(), Value::Null);
            }
            own.extend(message);
        }
    }
    if let (Some(usage), Some(answer)) = (usage, answer.as_object_mut()) {
        let (tokens_in, tokens_out) = (usage.prompt_tokens, usage.completion_tokens);
        let total = tokens_in.saturating_add(tokens_out);
        let usage = json!({ "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": total });
        answer.insert("usage".into(), usage);
    }
    Ok(answer.to_string().into())
}

fn object(piece: Piece) -> Map<String, Value> {
    match piece {
        Piece::Text(text) => Map::from_iter([("content".into(), text.into())]),
        Piece::Delta(delta) => delta,
    }
}

/// Puts a delta to what there is, as clients do: texts grow but for names of things, lists go by their `index`.
fn merge(into: &mut Map<String, Value>, from: Map<String, Value>) {
    for (key, value) in from {
        let is_name = ["role", "id", "type", "name", "index"].contains(&key.as_str());
        match (into.get_mut(&key), value) {
            (Some(Value::String(text)), Value::String(more)) if !is_name => text.push_str(&more),
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            (Some(Value::Array(old)), Value::Array(new)) => new.into_iter().for_each(|item| merge_item(old, item)),
            (Some(_), Value::Null) => {}
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

fn merge_item(list: &mut Vec<Value>, item: Value) {
    let index = item.get("index").cloned();
    let same = list.iter_mut().find(|old| index.is_some() && old.get("index") == index.as_ref());
    match (same, item) {
        (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
        (_, item) => list.push(item),
    }
}

/// Sends each piece on as it comes. Returns when the stream is over, however.
pub(crate) async fn stream(
    ask: &Ask,
    reply: &Reply,
    mut heard: Heard,
    mut request: Request,
    told: (&mpsc::Sender<Result<Bytes, Error>>, u64),
) -> Result<(), Error> {
    let (to, bytes_max) = told;
    let events = if ask.endpoint == Endpoint::Chat { chat::Events::chat(reply) } else { chat::Events::text(reply) };
    let budget = Budget { left: bytes_max, has_begun: false };
    let mut told = Told { to, events, is_chat: ask.endpoint == Endpoint::Chat, budget, tokens: 0 };
    loop {
        match heard {
            Heard::Piece(piece) => told.piece(piece).await?,
            Heard::Last(last) => return told.last(last, reply).await,
        }
        heard = tokio::select! {
            // Both are cancel-safe; who has gone needs nothing more.
            heard = request.next() => heard.map_err(error_of)?,
            () = to.closed() => return Ok(()),
        };
    }
}

/// A stream as far as it was told.
struct Told<'a> {
    to: &'a mpsc::Sender<Result<Bytes, Error>>,
    events: chat::Events,
    is_chat: bool,
    budget: Budget,
    tokens: u64,
}

impl Told<'_> {
    async fn piece(&mut self, piece: Piece) -> Result<(), Error> {
        let is_first = !self.budget.has_begun;
        self.budget.take(&piece)?;
        let has_role = matches!(&piece, Piece::Delta(delta) if delta.contains_key("role"));
        if let Some(role) = self.events.role().filter(|_| is_first && !has_role) {
            self.send(role).await;
        }
        match piece {
            Piece::Text(text) => {
                self.tokens = self.tokens.saturating_add(chat::count_tokens(&text));
                self.send(self.events.piece(&text)).await;
            }
            Piece::Delta(delta) if self.is_chat => {
                let text = delta.get("content").and_then(Value::as_str).unwrap_or_default();
                self.tokens = self.tokens.saturating_add(chat::count_tokens(text));
                self.send(self.events.raw(&json!(delta).to_string())).await;
            }
            Piece::Delta(_) => return Err(broken("answered a completion as a chat")),
        }
        Ok(())
    }

    async fn last(mut self, last: Last, reply: &Reply) -> Result<(), Error> {
        self.budget.check(&last)?;
        if let Some(body) = last.body {
            let events = chat::as_events(&body, self.is_chat, reply.wants_usage);
            for event in events.ok_or_else(|| broken("wrote a body that is no answer"))? {
                self.send(event).await;
            }
            return Ok(());
        }
        if let Some(text) = last.text {
            self.piece(Piece::Text(text)).await?;
        }
        self.send(self.events.finish_for(last.finish_reason.as_deref().unwrap_or("stop"))).await;
        if reply.wants_usage {
            let usage = last.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
            let (tokens_in, tokens_out) = usage.unwrap_or((reply.tokens_in.unwrap_or(0), self.tokens));
            self.send(self.events.usage(tokens_in, tokens_out)).await;
        }
        self.send(chat::DONE.to_owned()).await;
        Ok(())
    }

    /// Who has gone is noticed elsewhere.
    async fn send(&self, event: String) {
        let _ = self.to.send(Ok(event.into())).await;
    }
}
