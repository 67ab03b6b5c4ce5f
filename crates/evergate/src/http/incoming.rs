//! The body of a request, whichever protocol it comes by.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::intake::Stopped;
use crate::server::h1::{Cut, H1Body};

/// The body of a request.
#[derive(Debug)]
pub enum Incoming {
    /// Of HTTP/1.
    H1(H1Body),
    /// Of HTTP/2.
    H2(hyper::body::Incoming),
}

impl Incoming {
    /// All of it, if it was here with its head, as most are, and is no larger than that.
    pub fn take_whole(&mut self, bytes_max: u64) -> Option<Bytes> {
        match self {
            Self::H1(body) => body.take_whole(bytes_max),
            Self::H2(_) => None,
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Stopped;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Stopped>>> {
        match self.get_mut() {
            Self::H1(body) => body.poll_data().map(|data| {
                data.map(|data| match data {
                    Ok(data) => Ok(Frame::data(data)),
                    Err(Cut::Gone) => Err(Stopped::ClientGone),
                    Err(Cut::Broken(error)) => Err(Stopped::broken(error)),
                })
            }),
            Self::H2(body) => Pin::new(body).poll_frame(cx).map_err(Stopped::from),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::H1(body) => body.is_end(),
            Self::H2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::H1(body) => {
                let (bytes, is_all) = body.size();
                let mut hint = SizeHint::new();
                if is_all {
                    hint.set_exact(bytes);
                } else {
                    hint.set_lower(bytes);
                }
                hint
            }
            Self::H2(body) => body.size_hint(),
        }
    }
}
