"""The service, as a dependency of routes."""

from typing import Annotated

from fastapi import Depends, Request

from ..service import Service


async def service_of(request: Request) -> Service:
    return request.app.state.service


Used = Annotated[Service, Depends(service_of)]
